package spirt

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// lockPeer makes this process the only one that runs a peer, so that nothing
// is signed twice and no database has two writers, until release is called.
func lockPeer(dir string, n int) (release func() error, err error) {
	release, holder, err := lockPath(filepath.Join(dir, lockFileName))
	switch {
	case err != nil:
		return nil, fmt.Errorf("locking peer %d: %w", n, err)
	case release == nil && holder > 0:
		return nil, fmt.Errorf("peer %d of this run is running already, as process %d: end that one first", n, holder)
	case release == nil:
		return nil, fmt.Errorf("peer %d of this run is running already: end that process first", n)
	}
	return release, nil
}

// LockFolder makes this process the only one that uses a folder, which exists,
// until release is called. It returns an error that names the other process
// where there is one.
func LockFolder(dir string) (release func() error, err error) {
	release, holder, err := lockPath(filepath.Join(dir, lockFileName))
	switch {
	case err != nil:
		return nil, fmt.Errorf("locking %s: %w", dir, err)
	case release == nil && holder > 0:
		return nil, fmt.Errorf("%s is in use by process %d: end that one first or take another folder", dir, holder)
	case release == nil:
		return nil, fmt.Errorf("%s is in use by another process: end that one first or take another folder", dir)
	}
	return release, nil
}

// awaitPeer returns the process that runs a peer, and a channel that gets
// errNotOurs when it has ended. The channel is nil if none does.
func awaitPeer(run string, n int) (pid int, gone <-chan error) {
	path := filepath.Join(peerDir(run, n), lockFileName)
	held, pid, err := holder(path)
	if err != nil || !held || pid == 0 {
		return 0, nil // who starts it finds out
	}
	ended := make(chan error, 1)
	go func() { // ends with that process
		if err := awaitFree(path); err != nil {
			ended <- err
			return
		}
		ended <- errNotOurs
	}()
	return pid, ended
}

// lockPath locks a file and writes this process's number into it. Where
// another process has it, release is nil, and pid its number if it can be told.
func lockPath(path string) (release func() error, pid int, err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, 0, err
	}
	got, err := lockFile(f)
	for tries := 0; err == nil && !got; tries++ {
		var held bool
		if held, pid, err = holder(path); err == nil && (held || tries == askers) {
			f.Close()
			return nil, pid, nil
		} else if err == nil { // somebody only asked, and is done
			time.Sleep(time.Millisecond)
			got, err = lockFile(f)
		}
	}
	if err != nil {
		f.Close()
		return nil, 0, fmt.Errorf("locking %s: %w", path, err)
	}
	if err = f.Truncate(0); err == nil {
		_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f.Close, 0, nil
}

// awaitFree waits until no process has the lock of a file.
func awaitFree(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close() // gives the lock back
	return waitShared(f)
}

// askers is how often a lock is tried that others only asked about.
const askers = 200

// holder tells whether a process has a lock, and its number as it stands in
// the file: 0 if it has not written it yet. The lock counts, not the number,
// which may be that of a process that ended. A file that does not exist is not
// locked.
func holder(path string) (held bool, pid int, err error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, 0, nil
	} else if err != nil {
		return false, 0, err
	}
	defer f.Close() // gives the lock back
	free, err := lockShared(f)
	if err != nil || free {
		return false, 0, err
	}
	b, err := io.ReadAll(io.LimitReader(f, 20))
	if err != nil {
		return true, 0, err
	}
	pid, _ = strconv.Atoi(strings.TrimSpace(string(b)))
	return true, max(pid, 0), nil
}
