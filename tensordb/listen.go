package tensordb

import (
	"fmt"
	"net"
	"os"
	"time"
)

// MaxSocketPath is the longest path of a Unix socket, in bytes, that every
// system takes.
const MaxSocketPath = 103

// ListenUnix listens on a Unix socket that only this user can open (mode
// 0600). A socket that a killed process left behind is replaced; one that
// somebody listens on is an error. Closing the listener removes the file.
func ListenUnix(path string) (net.Listener, error) {
	if len(path) > MaxSocketPath {
		return nil, fmt.Errorf("listening on %s: a socket's path may have %d bytes, this has %d: use a shorter folder", path, MaxSocketPath, len(path))
	}
	if _, err := os.Lstat(path); err == nil {
		probe, err := net.DialTimeout("unix", path, time.Second)
		if err == nil {
			probe.Close()
			return nil, fmt.Errorf("listening on %s: another process listens there: stop it or use another folder", path)
		}
		if info, err := os.Lstat(path); err == nil && info.Mode()&os.ModeSocket == 0 {
			return nil, fmt.Errorf("listening on %s: there is a file that is not a socket: move it away", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("listening on %s: removing the socket of a process that is gone: %w", path, err)
		}
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listening on %s: %w", path, err)
	}
	// Whoever connects before the mode is set still needs a token.
	if err := os.Chmod(path, 0o600); err != nil {
		ln.Close()
		return nil, fmt.Errorf("listening on %s: %w", path, err)
	}
	return ln, nil
}
