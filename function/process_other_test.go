//go:build !linux

package function

import "os"

// alive reports whether a process exists; these systems tell only of those that can be signalled.
func alive(pid int) bool {
	process, err := os.FindProcess(pid)
	if err != nil {
		return false
	}
	defer process.Release()
	return process.Signal(os.Signal(nil)) == nil
}

func peerMain() {}
