//go:build unix

package spirt

import (
	"errors"
	"os"
	"syscall"
)

// lockFile takes the lock of an open file for this process and reports whether
// it got it. The system gives it back when the file is closed or the process
// ends, however it ends; processes that this one starts do not inherit it.
func lockFile(f *os.File) (bool, error) { return flock(f, syscall.LOCK_EX) }

// lockShared is lockFile for those who only ask whether a process has it: they
// do not keep out each other.
func lockShared(f *os.File) (bool, error) { return flock(f, syscall.LOCK_SH) }

// waitShared is lockShared once no process has the lock: it waits for that.
func waitShared(f *os.File) error {
	for {
		if err := syscall.Flock(int(f.Fd()), syscall.LOCK_SH); !errors.Is(err, syscall.EINTR) {
			return err
		}
	}
}

func flock(f *os.File, how int) (bool, error) {
	for {
		switch err := syscall.Flock(int(f.Fd()), how|syscall.LOCK_NB); {
		case err == nil:
			return true, nil
		case errors.Is(err, syscall.EWOULDBLOCK):
			return false, nil
		case !errors.Is(err, syscall.EINTR):
			return false, err
		}
	}
}
