//go:build unix

package spirt

import (
	"os"
	"os/exec"
	"syscall"
)

// ownGroup makes the process of cmd the leader of a new process group, out of
// reach of the terminal's Ctrl-C.
func ownGroup(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }

// interrupt asks a process to stop. It may have ended already.
func interrupt(p *os.Process) { _ = p.Signal(os.Interrupt) }
