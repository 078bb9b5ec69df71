//go:build integration && linux && amd64

package faults

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"github.com/spirt-ml/spirt/events"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A clock is the wall clock of one process, which can be set: that of the
// machine goes on as before. Go asks the kernel's vDSO for the time, memory
// that every process has a copy of once somebody writes to it.
type clock struct {
	mem    *os.File // of the process
	offset int64    // where the seconds that are added lie
}

// shim is clock_gettime as a system call, with seconds added to the wall clock.
var shim = []byte{
	0xb8, 0xe4, 0x00, 0x00, 0x00, // mov eax, SYS_clock_gettime
	0x0f, 0x05, // syscall
	0x85, 0xff, // test edi, edi (CLOCK_REALTIME is 0)
	0x75, 0x0a, // jne +10
	0x4c, 0x8b, 0x05, 0x04, 0x00, 0x00, 0x00, // mov r8, [rip+4]
	0x4c, 0x01, 0x06, // add [rsi], r8
	0xc3,                   // ret
	0, 0, 0, 0, 0, 0, 0, 0, // the seconds
}

// clockOf takes hold of the wall clock of a process.
func clockOf(t *testing.T, pid int) clock {
	t.Helper()
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mem.Close() })
	lo, hi, function := findClock(t, pid, mem)
	for set := false; !set; { // until no thread is in the code that is replaced
		syscall.Kill(pid, syscall.SIGSTOP)
		poll(t, "the threads of the process to stop", func() bool { return stoppedOutside(t, pid, 0, 0) })
		if set = stoppedOutside(t, pid, lo, hi); set {
			if _, err := mem.WriteAt(shim, function); err != nil {
				t.Fatal("writing the vDSO: ", err)
			}
		}
		syscall.Kill(pid, syscall.SIGCONT)
	}
	return clock{mem, function + int64(len(shim)) - 8}
}

// findClock returns where the vDSO of a process lies, and clock_gettime in it.
func findClock(t *testing.T, pid int, mem *os.File) (lo, hi, function int64) {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(maps)) {
		if strings.HasSuffix(strings.TrimSpace(line), "[vdso]") {
			fmt.Sscanf(line, "%x-%x", &lo, &hi)
		}
	}
	image := make([]byte, hi-lo)
	if _, err := mem.ReadAt(image, lo); err != nil {
		t.Fatal("reading the vDSO: ", err)
	}
	vdso, err := elf.NewFile(bytes.NewReader(image))
	if err != nil {
		t.Fatal(err)
	}
	symbols, err := vdso.DynamicSymbols()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range symbols {
		if s.Name == "__vdso_clock_gettime" {
			return lo, hi, lo + int64(s.Value)
		}
	}
	t.Fatal("the vDSO has no clock_gettime")
	return 0, 0, 0
}

// stoppedOutside reports whether all threads of a process are stopped, none
// of them between lo and hi.
func stoppedOutside(t *testing.T, pid int, lo, hi int64) bool {
	t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if err != nil || len(threads) == 0 {
		t.Fatal("no threads: ", err)
	}
	for _, thread := range threads {
		stat, _ := os.ReadFile(filepath.Join(thread, "stat"))
		if _, state, _ := bytes.Cut(stat, []byte(") ")); !bytes.HasPrefix(state, []byte("T")) {
			return false
		}
		var sp, pc int64 // the last two fields, in and out of a system call
		call, err := os.ReadFile(filepath.Join(thread, "syscall"))
		if err != nil {
			t.Fatal(err)
		}
		fields := strings.Fields(string(call))
		fmt.Sscan(fields[len(fields)-2]+" "+fields[len(fields)-1], &sp, &pc)
		if lo <= pc && pc < hi {
			return false
		}
	}
	return true
}

// machineClock is the wall clock of a peer and of its function instances.
type machineClock []clock

func (p *peer) clock() (m machineClock) {
	t, pid := p.c.t, p.cmd.Process.Pid
	t.Helper()
	for _, pid := range append(childrenOf(t, pid), pid) {
		m = append(m, clockOf(t, pid))
	}
	return m
}

// childrenOf returns the processes that a process has started.
func childrenOf(t *testing.T, pid int) (pids []int) {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		b, _ := os.ReadFile(task) // a thread may have ended
		for _, f := range strings.Fields(string(b)) {
			if n, err := strconv.Atoi(f); err == nil {
				pids = append(pids, n)
			}
		}
	}
	return pids
}

// set lets a peer's wall clock differ by d from the machine's.
func (p *peer) set(m machineClock, d time.Duration) {
	t := p.c.t
	t.Helper()
	for _, c := range m {
		seconds := binary.LittleEndian.AppendUint64(nil, uint64(int64(d/time.Second)))
		if n, err := c.mem.WriteAt(seconds, c.offset); n != len(seconds) {
			t.Fatal("setting a clock: ", err)
		}
	}
}

// Wall clocks jump by hours and years, forth and back: nobody is lost, nothing
// fails, and the events show that the clocks did jump.
func TestClocks(t *testing.T) {
	j := small(60)
	j.ValidateEvery = 1000 // so that no instance is started later
	c := newCluster(t, j)
	c.net.delay(10 * time.Millisecond)
	c.start()
	c.reach(1, 5)
	two, three := c.peer(2), c.peer(3)
	clock2, clock3 := two.clock(), three.clock()
	at := uint64(10)
	for _, d := range []time.Duration{time.Hour, -30 * 365 * 24 * time.Hour, 90 * 365 * 24 * time.Hour, 0} {
		two.set(clock2, d)
		three.set(clock3, -d/2)
		at += 10
		c.reach(2, at)
		if e := c.log.last(2); (time.Until(e.Time) - d).Abs() > 10*time.Minute {
			t.Errorf("the event has the time %v, the clock was %v off", e.Time, d)
		}
	}
	c.finish(60)
	jumps := map[int]int{}
	for _, e := range c.log.all() {
		switch {
		case e.Event == "warning" && e.Cause == events.CauseClock:
			jumps[e.Peer]++
		case e.State == "lost" || e.Degraded || e.Event == "warning":
			t.Errorf("unexpected: %+v", e)
		}
	}
	// The peers whose clocks were set say so, as often as they looked between.
	if len(jumps) != 2 || jumps[2] < 1 || jumps[3] < 1 {
		t.Errorf("jumps of clocks: %v", jumps)
	}
}
