package tensordb

import (
	"errors"
	"io"
	"os"
	"runtime"
	"strings"
	"syscall"
)

// files is the file system as checkpoints need it. Tests have one that
// crashes.
type files interface {
	// create makes an empty file, or empties one, that only this user can
	// read.
	create(path string) (fileWriter, error)
	open(path string) (fileReader, error)
	rename(from, to string) error
	remove(path string) error
	// list returns the names in a folder.
	list(dir string) ([]string, error)
	// syncDir makes the names in a folder durable.
	syncDir(dir string) error
}

type fileWriter interface {
	io.WriteCloser
	// Sync makes what was written durable, not the file's name.
	Sync() error
}

type fileReader interface {
	io.ReaderAt
	io.Closer
	size() (int64, error)
}

// disk is the operating system's.
type disk struct{}

func (disk) create(path string) (fileWriter, error) {
	return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
}

func (disk) open(path string) (fileReader, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	return diskFile{f}, nil
}

func (disk) rename(from, to string) error { return os.Rename(from, to) }
func (disk) remove(path string) error     { return os.Remove(path) }
func (disk) syncDir(dir string) error     { return syncDir(dir) }

func (disk) list(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, nil
}

type diskFile struct{ *os.File }

func (f diskFile) size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// diskFull reports whether an error says that there is no room.
func diskFull(err error) bool {
	const windowsDiskFull = syscall.Errno(112)
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || runtime.GOOS == "windows" && errors.Is(err, windowsDiskFull)
}

// temporarySuffix ends the name of a file that is being written.
const temporarySuffix = checkpointSuffix + ".tmp"

// removeTemporary removes what a crash left of checkpoints that were being
// written; nobody else writes any.
func (db *DB) removeTemporary() {
	names, err := db.files.list(db.config.Dir)
	if err != nil {
		return // whoever needs the folder says so
	}
	for _, name := range names {
		if stem, ok := strings.CutSuffix(name, temporarySuffix); ok && checkpointName(stem) != "" {
			path := db.path(name)
			if err := db.files.remove(path); err != nil {
				db.log.Warn("what a crash left could not be removed", "file", path, "error", err)
			}
		}
	}
}
