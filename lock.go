package spirt

import (
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
	if _, err := os.Stat(path); err != nil {
		return 0, nil
	}
	release, pid, err := lockPath(path)
	if err == nil && release != nil {
		release()
	}
	if err != nil || release != nil || pid == 0 {
		return 0, nil // who starts it finds out
	}
	ended := make(chan error, 1)
	go func() { // ends with that process
		for {
			if release, _, err := lockPath(path); err == nil && release != nil {
				release()
				ended <- errNotOurs
				return
			}
			time.Sleep(pollEvents)
		}
	}()
	return pid, ended
}

// lockPath locks a file and writes this process's number into it. Where
// another process has it, release is nil, and holder its number if it can be
// told.
func lockPath(path string) (release func() error, holder int, err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, 0, err
	}
	got, err := lockFile(f)
	if err != nil {
		f.Close()
		return nil, 0, fmt.Errorf("locking %s: %w", path, err)
	}
	if !got {
		// For people only: the lock counts, not the number.
		b, _ := io.ReadAll(io.LimitReader(f, 20))
		holder, _ = strconv.Atoi(strings.TrimSpace(string(b)))
		f.Close()
		return nil, holder, nil
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
