package spirt

import (
	"errors"
	"os"

	"golang.org/x/sys/windows"
)

// lockFile takes the lock of an open file for this process and reports whether
// it got it. The system gives it back when the file is closed or the process
// ends, however it ends.
func lockFile(f *os.File) (bool, error) { return lockRange(f, windows.LOCKFILE_EXCLUSIVE_LOCK) }

// lockShared is lockFile for those who only ask whether a process has it: they
// do not keep out each other.
func lockShared(f *os.File) (bool, error) { return lockRange(f, 0) }

// waitShared is lockShared once no process has the lock: it waits for that.
func waitShared(f *os.File) error {
	at := windows.Overlapped{OffsetHigh: 1}
	return windows.LockFileEx(windows.Handle(f.Fd()), 0, 0, 1, 0, &at)
}

func lockRange(f *os.File, how uint32) (bool, error) {
	// A byte beyond the content, which can be read all the same.
	at := windows.Overlapped{OffsetHigh: 1}
	err := windows.LockFileEx(windows.Handle(f.Fd()), how|windows.LOCKFILE_FAIL_IMMEDIATELY, 0, 1, 0, &at)
	if errors.Is(err, windows.ERROR_LOCK_VIOLATION) {
		return false, nil
	}
	return err == nil, err
}
