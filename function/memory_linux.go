package function

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

const canReadMemory = true

// processMemory reads the resident bytes of a process, now and at most, from the kernel.
func processMemory(pid int) (resident, peak int64) {
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return 0, 0
	}
	defer f.Close()
	var buf [4 << 10]byte // the lines wanted are within the first kilobyte
	n, _ := f.Read(buf[:])
	return statusField(buf[:n], "\nVmRSS:"), statusField(buf[:n], "\nVmHWM:")
}

// statusField returns the bytes of a line such as "VmRSS:     1234 kB".
func statusField(status []byte, name string) int64 {
	i := bytes.Index(status, []byte(name))
	if i < 0 {
		return 0
	}
	fields := bytes.Fields(status[i+len(name):])
	if len(fields) < 2 || string(fields[1]) != "kB" {
		return 0
	}
	kib, err := strconv.ParseInt(string(fields[0]), 10, 54)
	if err != nil {
		return 0
	}
	return kib << 10
}

// memoryGroups makes one cgroup (version 2) for each instance, with the memory limit of the function, under a group that
// was delegated to this process. A nil *memoryGroups makes none.
type memoryGroups struct {
	root  string // ours, holds the instances'
	limit int64  // bytes
	log   *slog.Logger
	next  atomic.Int64
}

var groupNumber atomic.Int64 // platforms of this process

// newMemoryGroups returns nil where this process may not make groups with a memory limit: then memory is watched.
func newMemoryGroups(limitMB int, log *slog.Logger) *memoryGroups {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil
	}
	name := fmt.Sprintf("spirt-%d-%d", os.Getpid(), groupNumber.Add(1))
	for _, parent := range delegated("/sys/fs/cgroup", string(own), os.Geteuid()) {
		g, err := makeMemoryGroups(parent, name, int64(limitMB)<<20)
		if err == nil {
			g.log = log
			log.Debug("memory is limited by cgroup", "folder", g.root)
			return g
		}
		log.Debug("no memory limit by cgroup", "folder", parent, "reason", err)
	}
	return nil
}

// delegated lists the cgroups that may be ours to divide: the one this process is in, and, for a user other than root,
// its parent, since a group that holds processes cannot be divided and systemd's DelegateSubgroup= makes such a parent.
func delegated(mount, own string, uid int) []string {
	for line := range strings.Lines(own) {
		path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::/")
		if !ok {
			continue
		}
		path = filepath.Join(mount, filepath.Clean("/"+path))
		list := []string{path}
		if uid != 0 && path != mount {
			list = append(list, filepath.Dir(path))
		}
		return list
	}
	return nil
}

// makeMemoryGroups makes a group under parent in which groups with a memory limit can be made.
func makeMemoryGroups(parent, name string, limit int64) (*memoryGroups, error) {
	controllers, err := os.ReadFile(filepath.Join(parent, "cgroup.controllers"))
	if err != nil {
		return nil, err
	}
	if !slices.Contains(strings.Fields(string(controllers)), "memory") {
		return nil, errors.New("it has no memory controller")
	}
	if err := enableMemory(parent); err != nil {
		return nil, err
	}
	root := filepath.Join(parent, name)
	if err := os.Mkdir(root, 0o755); err != nil {
		return nil, err
	}
	g := &memoryGroups{root: root, limit: limit}
	err = enableMemory(root)
	if err == nil { // try the whole of it once
		var m *memoryGroup
		if m, err = g.make(); err == nil {
			m.remove()
		}
	}
	if err != nil {
		os.Remove(root)
		return nil, err
	}
	return g, nil
}

func enableMemory(dir string) error {
	file := filepath.Join(dir, "cgroup.subtree_control")
	if enabled, err := os.ReadFile(file); err != nil {
		return err
	} else if slices.Contains(strings.Fields(string(enabled)), "memory") {
		return nil
	}
	return os.WriteFile(file, []byte("+memory"), 0)
}

// add makes the group of one instance; nil, and a line in the log, where that fails.
func (g *memoryGroups) add() *memoryGroup {
	if g == nil {
		return nil
	}
	m, err := g.make()
	if err != nil {
		g.log.Warn("no memory limit by cgroup for an instance", "reason", err)
		return nil
	}
	return m
}

func (g *memoryGroups) make() (*memoryGroup, error) {
	path := filepath.Join(g.root, "instance-"+strconv.FormatInt(g.next.Add(1), 10))
	if err := os.Mkdir(path, 0o755); err != nil {
		return nil, err
	}
	m := &memoryGroup{path: path}
	err := os.WriteFile(filepath.Join(path, "memory.max"), strconv.AppendInt(nil, g.limit, 10), 0)
	if err == nil {
		m.dir, err = os.Open(path)
	}
	if err != nil {
		os.Remove(path)
		return nil, err
	}
	// All of an instance ends together, and swap does not stretch its limit; older kernels lack these files.
	os.WriteFile(filepath.Join(path, "memory.oom.group"), []byte("1"), 0)
	os.WriteFile(filepath.Join(path, "memory.swap.max"), []byte("0"), 0)
	return m, nil
}

func (g *memoryGroups) close() {
	if g != nil {
		removeGroup(g.root)
	}
}

// memoryGroup is the cgroup of one instance.
type memoryGroup struct {
	path string
	dir  *os.File
}

// killed reports whether the kernel has killed a process of the group for its memory.
func (m *memoryGroup) killed() bool {
	events, err := os.ReadFile(filepath.Join(m.path, "memory.events"))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(events)) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == "oom_kill" {
			return f[1] != "0"
		}
	}
	return false
}

func (m *memoryGroup) remove() {
	m.dir.Close()
	removeGroup(m.path)
}

// removeGroup removes an empty group; processes that were killed a moment ago may still be in it.
func removeGroup(path string) {
	for range 50 {
		if err := os.Remove(path); err == nil || errors.Is(err, fs.ErrNotExist) {
			return
		}
		time.Sleep(2 * time.Millisecond)
	}
}
