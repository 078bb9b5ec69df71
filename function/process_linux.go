package function

import (
	"os/exec"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// processGroup is an instance's process with all that it starts.
type processGroup struct {
	mem *memoryGroup // nil: its memory is watched instead

	mu     sync.Mutex
	pid    int // its leader; 0: not started, or reaped, after which the number may be another's
	reaped bool
	oom    bool // the kernel killed it at its memory limit
}

// newProcessGroup prepares cmd to start as the leader of its own process group, in mem's cgroup if there is one, and to
// be killed when the thread that starts it ends.
func newProcessGroup(cmd *exec.Cmd, mem *memoryGroup) *processGroup {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if mem != nil {
		cmd.SysProcAttr.UseCgroupFD = true
		cmd.SysProcAttr.CgroupFD = int(mem.dir.Fd())
	}
	return &processGroup{mem: mem}
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
	g.killLocked()
}

func (g *processGroup) killLocked() {
	if g.pid != 0 && !g.reaped {
		unix.Kill(-g.pid, unix.SIGKILL)
	}
}

// wait waits until the leader ends, kills what is left of its group, and returns how the leader ended. The leader is
// reaped last: until then its number stands for this group and no other.
func (g *processGroup) wait(cmd *exec.Cmd) error {
	for unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.killLocked()
	err := cmd.Wait()
	g.reaped = true
	g.oom = g.mem != nil && g.mem.killed()
	return err
}

func (g *processGroup) close() {
	if g.mem != nil {
		g.mem.remove()
	}
}

// outOfMemory reports whether the kernel killed the group at its memory limit.
func (g *processGroup) outOfMemory() bool {
	if g == nil {
		return false
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.oom
}

// memory returns the resident bytes of the process now and at most; 0 where they cannot be told.
func (g *processGroup) memory(pid int) (resident, peak int64) {
	if g == nil || pid == 0 {
		return 0, 0
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.reaped {
		return 0, 0
	}
	return processMemory(pid)
}
