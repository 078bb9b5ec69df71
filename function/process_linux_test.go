package function

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// alive reports whether a process exists and is not only waiting to be reaped.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, after, _ := bytes.Cut(stat, []byte(") "))
	return len(after) > 0 && after[0] != 'Z' && after[0] != 'X'
}

// gone waits until a process that need not be a child ends.
func gone(t *testing.T, pid int) {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 20_000)
		switch {
		case err == unix.EINTR:
		case err != nil:
			t.Fatal(err)
		case n == 0:
			t.Fatalf("process %d lives on", pid)
		default:
			return
		}
	}
}

// What a function starts ends with its instance.
func TestTimeoutKillsGroup(t *testing.T) {
	p := platform(t, Config{Concurrency: 1, Timeout: 300 * time.Millisecond, Retries: -1})
	_, inv, err := p.Invoke(t.Context(), event(t, order{Do: "child and hang"}))
	var failed *FunctionError
	if !errors.As(err, &failed) || failed.Type != TypeTimeout {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`child (\d+)`).FindStringSubmatch(failed.Output)
	if m == nil {
		t.Fatalf("output %q", failed.Output)
	}
	child, _ := strconv.Atoi(m[1])
	gone(t, inv.Instance)
	gone(t, child)
}

// A child that outlives its instance is killed with the rest of the group, and does not keep the instance's end from
// being seen though it holds the output.
func TestCrashKillsGroup(t *testing.T) {
	p := platform(t, Config{Concurrency: 1, Retries: -1})
	body, inv, err := p.Invoke(t.Context(), event(t, order{Do: "child"}))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(inv.Instance, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	gone(t, inv.Instance)
	gone(t, read(t, body).Child)
}

func TestMemoryLimit(t *testing.T) {
	p := platform(t, Config{MemoryMB: 80, Retries: -1})
	_, inv, err := p.Invoke(t.Context(), event(t, order{Do: "allocate", Size: 500}))
	var failed *FunctionError
	if !errors.As(err, &failed) || failed.Type != TypeMemory {
		t.Fatalf("error %v", err)
	}
	if !strings.Contains(failed.Message, fmt.Sprintf("instance %d ", inv.Instance)) || !strings.Contains(failed.Message, "limit of 80 MB") {
		t.Errorf("error %v does not name instance and limit", err)
	}
	if inv.PeakMemoryMB <= 80 {
		t.Errorf("meter %+v", inv)
	}
	if s := p.Stats(); s.MemoryKills != 1 {
		t.Errorf("stats %+v", s)
	}
}

// peerMain is a peer whose executable has been deleted, with instances that are to die with it.
func peerMain() {
	if err := os.Remove(os.Getenv("SPIRT_TEST_PEER")); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	p, err := New(Config{Command: []string{Self()}, Concurrency: 2})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	started := make(chan int, 2)
	p.onEvent = func(what string, pid int) {
		if what == "start" {
			started <- pid
		}
	}
	for range 2 {
		go p.Invoke(context.Background(), []byte(`{"do":"hang"}`))
	}
	fmt.Println(<-started, <-started)
	hang()
}

// kill -9 of a peer ends its instances, also those in the middle of an invocation.
func TestPeerKilled(t *testing.T) {
	self, err := os.ReadFile(Self())
	if err != nil {
		t.Fatal(err)
	}
	exe := filepath.Join(t.TempDir(), "peer")
	if err := os.WriteFile(exe, self, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), "SPIRT_TEST_PEER="+exe)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pids [2]int
	if _, err := fmt.Fscan(out, &pids[0], &pids[1]); err != nil {
		t.Fatal(err)
	}
	for _, pid := range pids {
		if !alive(pid) {
			t.Errorf("instance %d does not live", pid)
		}
	}
	cmd.Process.Kill()
	cmd.Wait()
	for _, pid := range pids {
		gone(t, pid)
	}
}

func TestStatusField(t *testing.T) {
	status := []byte("Name:\tx\nVmHWM:\t   2048 kB\nVmRSS:\t    1024 kB\nVmBad:\t1\nVmWorse:\tx kB\n")
	for name, want := range map[string]int64{"\nVmHWM:": 2 << 20, "\nVmRSS:": 1 << 20, "\nVmNone:": 0, "\nVmBad:": 0, "\nVmWorse:": 0} {
		if got := statusField(status, name); got != want {
			t.Errorf("%q: %d, want %d", name, got, want)
		}
	}
	resident, peak := processMemory(os.Getpid())
	if resident < 1<<20 || peak < resident {
		t.Errorf("of this process: %d resident, %d at most", resident, peak)
	}
}

// The files that are read and written in a folder like a cgroup's; whether the kernel acts on them is not tested here.
func TestMemoryGroupFiles(t *testing.T) {
	parent := t.TempDir()
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(parent, path), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := makeMemoryGroups(parent, "ours", 1<<20); err == nil {
		t.Error("made in a folder that is no cgroup")
	}
	write("cgroup.controllers", "cpu io\n")
	if _, err := makeMemoryGroups(parent, "ours", 1<<20); err == nil {
		t.Error("made without a memory controller")
	}
	write("cgroup.controllers", "cpu memory io\n")
	write("cgroup.subtree_control", "cpu\n")
	// A plain folder gets no files of its own, so enabling memory in the new group must fail and leave nothing.
	if _, err := makeMemoryGroups(parent, "ours", 1<<20); err == nil {
		t.Error("made in a folder that is no cgroup")
	}
	if b, _ := os.ReadFile(filepath.Join(parent, "cgroup.subtree_control")); string(b) != "+memory" {
		t.Errorf("subtree_control has %q", b)
	}
	if _, err := os.Stat(filepath.Join(parent, "ours")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the group is left: %v", err)
	}
	g := &memoryGroups{root: parent, limit: 80 << 20}
	m, err := g.make()
	if err != nil {
		t.Fatal(err)
	}
	defer m.dir.Close()
	if b, _ := os.ReadFile(filepath.Join(m.path, "memory.max")); string(b) != "83886080" {
		t.Errorf("memory.max has %q", b)
	}
	for events, want := range map[string]bool{"": false, "low 0\noom 3\noom_kill 0\n": false, "oom 1\noom_kill 2\noom_group_kill 1\n": true} {
		if err := os.WriteFile(filepath.Join(m.path, "memory.events"), []byte(events), 0o644); err != nil {
			t.Fatal(err)
		}
		if m.killed() != want {
			t.Errorf("events %q: killed is %v", events, m.killed())
		}
	}
}

func TestDelegated(t *testing.T) {
	for _, c := range []struct {
		own  string
		uid  int
		want string
	}{
		{"12:pids:/x\n0::/\n", 0, "[/cg]"},
		{"0::/user.slice/peer.service/main\n", 1000, "[/cg/user.slice/peer.service/main /cg/user.slice/peer.service]"},
		{"0::/system.slice/peer.service\n", 0, "[/cg/system.slice/peer.service]"},
		{"0::/../../outside\n", 0, "[/cg/outside]"},
		{"4:memory:/x\n", 0, "[]"},
		{"", 0, "[]"},
	} {
		if got := fmt.Sprint(delegated("/cg", c.own, c.uid)); got != c.want {
			t.Errorf("%q: %s, want %s", c.own, got, c.want)
		}
	}
}
