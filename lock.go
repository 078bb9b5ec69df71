package spirt

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// lockPeer makes this process the only one that runs a peer, so that nothing
// is signed twice and no database has two writers, until release is called.
func lockPeer(dir string, n int) (release func() error, err error) {
	f, err := os.OpenFile(filepath.Join(dir, lockFileName), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("locking peer %d: %w", n, err)
	}
	got, err := lockFile(f)
	switch {
	case err != nil:
		err = fmt.Errorf("locking %s: %w", f.Name(), err)
	case !got:
		// For people only: the lock counts, not the number.
		b, _ := io.ReadAll(io.LimitReader(f, 20))
		if pid, e := strconv.Atoi(strings.TrimSpace(string(b))); e == nil {
			err = fmt.Errorf("peer %d of this run is running already, as process %d: end that one first", n, pid)
		} else {
			err = fmt.Errorf("peer %d of this run is running already: end that process first", n)
		}
	}
	if err == nil {
		if err = f.Truncate(0); err == nil {
			_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
		}
		if err == nil {
			return f.Close, nil
		}
		err = fmt.Errorf("locking peer %d: %w", n, err)
	}
	f.Close()
	return nil, err
}
