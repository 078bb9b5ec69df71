package spirt

import (
	"os"
	"os/exec"
	"syscall"
)

// ownGroup makes the process of cmd the leader of a new process group, out of
// reach of the console's Ctrl-C.
func ownGroup(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{CreationFlags: syscall.CREATE_NEW_PROCESS_GROUP}
}

// interrupt ends a process: Windows has no signal that asks one in another
// group to stop.
func interrupt(p *os.Process) { _ = p.Kill() }
