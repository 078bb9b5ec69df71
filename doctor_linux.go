package spirt

import (
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// measure fills in what the system says of a folder, of limits and of its
// clock.
func (h *host) measure(dir string) {
	var disk unix.Statfs_t
	if unix.Statfs(dir, &disk) == nil {
		h.free = max(1, disk.Bavail*uint64(disk.Bsize))
	}
	var files unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &files) == nil {
		h.files = files.Cur
	}
	var clock unix.Timex
	if state, err := unix.Adjtimex(&clock); err == nil && (state == unix.TIME_ERROR || clock.Status&unix.STA_UNSYNC != 0) {
		h.clock = "nothing says that the clock is synchronised"
	}
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return
	}
	for _, line := range strings.Split(string(b), "\n") {
		if group, ok := strings.CutPrefix(line, "0::"); ok {
			h.limits(os.DirFS("/sys/fs/cgroup"), group)
		}
	}
}

// limits takes in those of a control group and of those above it.
func (h *host) limits(root fs.FS, group string) {
	for at := strings.Trim(group, "/"); ; at = path.Dir(at) {
		at = path.Clean(at)
		if quota, period, ok := cgroupValue(root, path.Join(at, "cpu.max")); ok && period > 0 && (h.quota == 0 || quota/period < h.quota) {
			h.quota = quota / period
		}
		if limit, _, ok := cgroupValue(root, path.Join(at, "memory.max")); ok && limit > 0 && uint64(limit) < h.memory {
			h.memory = uint64(limit)
		}
		if at == "." {
			return
		}
	}
}
