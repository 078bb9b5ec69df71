//go:build unix && !linux

package function

import (
	"os/exec"
	"sync"
	"syscall"
)

// processGroup is an instance's process with all that it starts.
type processGroup struct {
	mu     sync.Mutex
	pid    int
	reaped bool
}

// newProcessGroup prepares cmd to start as the leader of its own process group. These systems cannot kill it with its
// parent: a runtime ends itself when its Runtime API is gone, at the latest at the end of its invocation.
func newProcessGroup(cmd *exec.Cmd, _ *memoryGroup) *processGroup {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return &processGroup{}
}

func (g *processGroup) started(cmd *exec.Cmd) error {
	g.mu.Lock()
	g.pid = cmd.Process.Pid
	g.mu.Unlock()
	return nil
}

// kill kills every process of the group.
func (g *processGroup) kill() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.pid != 0 && !g.reaped {
		syscall.Kill(-g.pid, syscall.SIGKILL)
	}
}

// wait waits until the leader ends, kills what is left of its group, and returns how the leader ended.
func (g *processGroup) wait(cmd *exec.Cmd) error {
	err := cmd.Wait()
	g.kill()
	g.mu.Lock()
	g.reaped = true
	g.mu.Unlock()
	return err
}

func (g *processGroup) close() {}

func (g *processGroup) outOfMemory() bool { return false }

func (g *processGroup) memory(int) (resident, peak int64) { return 0, 0 }
