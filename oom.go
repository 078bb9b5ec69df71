package spirt

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// outOfMemory says of a process that was killed whether the kernel did it for
// lack of memory. Where the kernel does not tell, it says so.
func outOfMemory(e *exec.ExitError) string {
	if s, ok := e.Sys().(syscall.WaitStatus); !ok || s.Signal() != syscall.SIGKILL {
		return ""
	}
	kills, ok := oomKills()
	switch {
	case !ok:
		return " (by somebody, or by the system for lack of memory: its log says)"
	case kills > 0:
		return " (probably by the system, which has killed for lack of memory in this control group: take fewer peers, a smaller batch, or more memory)"
	}
	return ""
}

// oomKills returns how many processes of this control group were killed for
// lack of memory.
func oomKills() (n int, ok bool) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return 0, false
	}
	for _, line := range strings.Split(string(b), "\n") {
		path, ok := strings.CutPrefix(line, "0::")
		if !ok {
			continue
		}
		events, err := os.ReadFile(filepath.Join("/sys/fs/cgroup", path, "memory.events"))
		if err != nil {
			return 0, false
		}
		for _, line := range strings.Split(string(events), "\n") {
			if count, ok := strings.CutPrefix(line, "oom_kill "); ok {
				n, err := strconv.Atoi(strings.TrimSpace(count))
				return n, err == nil
			}
		}
	}
	return 0, false
}
