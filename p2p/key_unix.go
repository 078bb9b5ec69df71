//go:build unix

package p2p

import (
	"fmt"
	"io/fs"
)

func checkKeyMode(path string, mode fs.FileMode) error {
	if perm := mode.Perm(); perm&0o077 != 0 {
		return fmt.Errorf("private key %s has mode %04o, so others may read it: run \"chmod 600 %s\", or make a new identity if someone may have", path, perm, path)
	}
	return nil
}
