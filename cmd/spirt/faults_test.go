//go:build unix

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spirt-ml/spirt"
)

// limit bounds each of these tests: a run that hangs fails.
const limit = 2 * time.Minute

// trainRun is a `spirt train --json` in a process of its own.
type trainRun struct {
	t      *testing.T
	dir    string
	cmd    *exec.Cmd
	events *bufio.Scanner
	stderr *bytes.Buffer
	pids   map[int]int // of the peers, by number
	seen   []spirt.Event
}

// startTrain starts a run with the given flags in a new folder.
func startTrain(t *testing.T, flags ...string) *trainRun {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return startTrainOf(t, exe, flags...)
}

func startTrainOf(t *testing.T, exe string, flags ...string) *trainRun {
	t.Helper()
	r := &trainRun{t: t, dir: filepath.Join(t.TempDir(), "run"), stderr: new(bytes.Buffer), pids: map[int]int{}}
	r.cmd = exec.Command(exe, append([]string{"train", "--json", "--run", r.dir}, flags...)...)
	r.cmd.Stderr = r.stderr
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	r.events = bufio.NewScanner(out)
	r.events.Buffer(nil, 1<<20)
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(limit, func() { r.killAll() })
	t.Cleanup(func() {
		timer.Stop()
		r.killAll()
		if t.Failed() {
			t.Logf("stderr:\n%s", r.stderr)
			for n := range r.pids {
				b, _ := os.ReadFile(filepath.Join(r.dir, "peers", strconv.Itoa(n), "log"))
				t.Logf("log of peer %d:\n%s", n, b[max(0, len(b)-4096):])
			}
		}
	})
	return r
}

func (r *trainRun) killAll() {
	r.cmd.Process.Kill()
	for _, pid := range r.pids {
		syscall.Kill(pid, syscall.SIGKILL)
	}
}

// until reads events up to the first for which ok returns true.
func (r *trainRun) until(what string, ok func(e spirt.Event) bool) spirt.Event {
	r.t.Helper()
	for r.events.Scan() {
		var e spirt.Event
		if err := json.Unmarshal(r.events.Bytes(), &e); err != nil {
			r.t.Fatalf("event %s: %v", r.events.Bytes(), err)
		}
		r.seen = append(r.seen, e)
		if e.Event == "peer" && e.State == "started" {
			r.pids[e.Peer] = e.PID
		}
		if ok(e) {
			return e
		}
	}
	r.t.Fatalf("the run ended without %s", what)
	return spirt.Event{}
}

func (r *trainRun) round(peer int, round uint64) {
	r.t.Helper()
	r.until("round "+strconv.FormatUint(round, 10), func(e spirt.Event) bool {
		return e.Event == "round" && e.Peer == peer && e.Round >= round
	})
}

// done reads the run to its end and returns the last event.
func (r *trainRun) done() spirt.Event {
	r.t.Helper()
	e := r.until("done", func(e spirt.Event) bool { return e.Event == "done" })
	if err := r.cmd.Wait(); err != nil {
		r.t.Fatalf("train: %v\n%s", err, r.stderr)
	}
	return e
}

// sameModel fails unless every surviving peer ended with the model of done.
func (r *trainRun) sameModel(done spirt.Event, lost ...int) {
	r.t.Helper()
	for _, p := range done.Peers {
		isLost := slices.Contains(lost, p.Peer)
		if isLost != (p.State != "finished") {
			r.t.Errorf("peer %d ended as %s", p.Peer, p.State)
		}
		if !isLost && p.Model != done.Model {
			r.t.Errorf("peer %d has the model %s, the run %s", p.Peer, p.Model, done.Model)
		}
	}
}

// undisturbed runs a job to its end, again where a timeout fired: then runs
// with one seed may differ.
func undisturbed(t *testing.T, flags ...string) spirt.Event {
	t.Helper()
	for range 3 {
		r := startTrain(t, flags...)
		done := r.done()
		r.sameModel(done)
		if done.Timeouts == 0 {
			return done
		}
	}
	t.Fatal("timeouts fired in each of three runs: is this machine overloaded?")
	return spirt.Event{}
}

func TestSameSeedSameModel(t *testing.T) {
	flags := []string{"--model", "lenet5", "--rounds", "12", "--batches-per-round", "3", "--batch-size", "16", "--seed"}
	first, second := undisturbed(t, append(flags, "1")...), undisturbed(t, append(flags, "1")...)
	if first.Model != second.Model {
		t.Errorf("two runs with one seed ended with the models %s and %s", first.Model, second.Model)
	}
	if other := undisturbed(t, append(flags, "2")...); first.Model == other.Model {
		t.Error("runs with different seeds ended with one model")
	}
}

// A peer that is killed is noticed within two rounds, and the others finish
// with one model.
func TestKillPeer(t *testing.T) {
	r := startTrain(t, "--model", "mlp", "--rounds", "60")
	r.round(1, 20)
	victim := 3
	syscall.Kill(r.pids[victim], syscall.SIGKILL)
	done := r.done()
	r.sameModel(done, victim)
	if done.Rounds != 60 {
		t.Errorf("the run ended after %d rounds", done.Rounds)
	}
	noticed(t, r, victim, 1, 2, 4)
}

// noticed fails unless each survivor reported the loss of the victim and took
// its average into at most two more rounds than that.
func noticed(t *testing.T, r *trainRun, victim int, survivors ...int) {
	t.Helper()
	for _, p := range survivors {
		head, lost, last := uint64(0), uint64(0), uint64(0)
		for _, e := range r.seen {
			switch {
			case e.Event == "peer" && e.By == p && e.Peer == victim && e.State == "lost":
				lost = head
			case e.Event == "round" && e.Peer == p:
				head = e.Round
				if slices.Contains(e.Members, victim) {
					last = e.Round
				}
			}
		}
		switch {
		case lost == 0:
			t.Errorf("peer %d did not notice the end of peer %d", p, victim)
		case last > lost+2:
			t.Errorf("peer %d noticed at round %d, and round %d still has the average of peer %d", p, lost, last, victim)
		}
	}
}

// A peer that was killed is started again by hand, catches up with the others
// and ends with their model.
func TestRestartPeer(t *testing.T) {
	r := startTrain(t, "--model", "cnn", "--batch-size", "8", "--rounds", "60")
	r.round(1, 10)
	syscall.Kill(r.pids[2], syscall.SIGKILL)
	r.until("the end of peer 2", func(e spirt.Event) bool { return e.Event == "peer" && e.Peer == 2 && e.State == "crashed" })
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	again := exec.Command(exe, "peer", "--run", r.dir, "--peer", "2")
	again.Stderr = os.Stderr
	if err := again.Start(); err != nil {
		t.Fatal(err)
	}
	done := r.done()
	if err := again.Wait(); err != nil {
		t.Fatalf("the peer that was started again: %v", err)
	}
	if got := lastModel(t, r.dir, 2); got != done.Model {
		t.Errorf("the peer that was started again has the model %s, the others %s", got, done.Model)
	}
}

// lastModel returns the model in the last round event of a peer.
func lastModel(t *testing.T, dir string, peer int) (model string) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "events.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.Lines(b) {
		var e spirt.Event
		if err := json.Unmarshal(line, &e); err != nil {
			t.Fatal(err)
		}
		if e.Event == "round" && e.Peer == peer {
			model = e.Model
		}
	}
	return model
}

// The process that started the peers coordinates nothing: they finish when it
// is killed, and leave the model.
func TestKillTrain(t *testing.T) {
	r := startTrain(t, "--model", "mlp", "--rounds", "80")
	r.round(1, 10)
	r.cmd.Process.Kill()
	r.cmd.Wait()
	deadline, tick := time.After(limit), time.Tick(20*time.Millisecond)
	for n, pid := range r.pids {
		for syscall.Kill(pid, 0) == nil && !zombie(pid) { // not this process's child, so that it cannot be waited for
			select {
			case <-tick:
			case <-deadline:
				t.Fatalf("peer %d still runs", n)
			}
		}
	}
	model := lastModel(t, r.dir, 1)
	for n := range r.pids {
		if got := lastModel(t, r.dir, n); got != model {
			t.Errorf("peer %d ended with the model %s, peer 1 with %s", n, got, model)
		}
	}
	e, err := spirt.Eval(r.dir, "")
	if err != nil {
		t.Fatal(err)
	}
	if e.Model != model || *e.Accuracy < 0.5 {
		t.Errorf("the model file has the hash %s and accuracy %.3f, the peers ended with %s", e.Model, *e.Accuracy, model)
	}
}

// zombie reports whether a process has ended but was not waited for.
func zombie(pid int) bool {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return false
	}
	_, after, _ := bytes.Cut(b, []byte(") "))
	return bytes.HasPrefix(after, []byte("Z"))
}

// Instances are killed while they work: no gradient is lost or counted twice,
// so the model is that of an undisturbed run with the same seed.
func TestKillInstances(t *testing.T) {
	flags := []string{"--model", "cnn", "--peers", "2", "--rounds", "8", "--batches-per-round", "4", "--batch-size", "32"}
	want := undisturbed(t, flags...)

	r := startTrain(t, flags...)
	killed := 0
	for i := uint64(1); i <= 5; i++ {
		r.round(1, i)
		for _, pid := range r.pids {
			for _, instance := range childrenOf(t, pid) {
				if syscall.Kill(instance, syscall.SIGKILL) == nil {
					killed++
				}
			}
		}
	}
	done := r.done()
	r.sameModel(done)
	if killed == 0 {
		t.Fatal("no instance was found to kill")
	}
	t.Logf("killed %d instances", killed)
	if done.Model != want.Model {
		t.Errorf("the model is %s, undisturbed it was %s (%d timeouts)", done.Model, want.Model, done.Timeouts)
	}
}

// childrenOf returns the processes that a process has started.
func childrenOf(t *testing.T, pid int) (pids []int) {
	t.Helper()
	tasks, err := filepath.Glob(filepath.Join("/proc", strconv.Itoa(pid), "task", "*", "children"))
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		b, err := os.ReadFile(task)
		if err != nil {
			continue // the thread has ended
		}
		for _, f := range strings.Fields(string(b)) {
			if n, err := strconv.Atoi(f); err == nil {
				pids = append(pids, n)
			}
		}
	}
	return pids
}

func TestInterrupt(t *testing.T) {
	r := startTrain(t, "--model", "mlp", "--rounds", "100000")
	r.round(1, 5)
	r.cmd.Process.Signal(os.Interrupt)
	for r.events.Scan() {
	}
	err := r.cmd.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != spirt.ExitInterrupted {
		t.Fatalf("train ended with %v\n%s", err, r.stderr)
	}
	for n, pid := range r.pids {
		if syscall.Kill(pid, 0) == nil {
			t.Errorf("peer %d still runs", n)
		}
	}
}

// failing runs train to its end and returns its exit code and standard error.
func failing(t *testing.T, flags ...string) (code int, stderr string) {
	t.Helper()
	r := startTrain(t, flags...)
	for r.events.Scan() {
	}
	r.cmd.Wait()
	return r.cmd.ProcessState.ExitCode(), r.stderr.String()
}

func TestTakenPort(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	code, stderr := failing(t, "--peers", "1", "--listen", l.Addr().String())
	if code != spirt.ExitFailed || !strings.Contains(stderr, l.Addr().String()) || !strings.Contains(stderr, "in use") {
		t.Errorf("exit code %d, standard error:\n%s", code, stderr)
	}
}

// A run that diverges ends with the refused gradient's name, not with a model
// of NaNs.
func TestDivergingRun(t *testing.T) {
	code, stderr := failing(t, "--model", "mlp", "--peers", "2", "--optimizer", "sgd", "--lr", "1e30", "--rounds", "50")
	if code != spirt.ExitFailed || !strings.Contains(stderr, "not finite") || !strings.Contains(stderr, "learning rate") {
		t.Errorf("exit code %d, standard error:\n%s", code, stderr)
	}
}

// A peer whose key is not the roster's is refused, by itself and by others.
func TestForeignIdentity(t *testing.T) {
	r := startTrain(t, "--model", "logistic", "--peers", "2", "--rounds", "3")
	r.done()
	other := startTrain(t, "--model", "logistic", "--peers", "2", "--rounds", "3")
	other.done()
	key, err := os.ReadFile(filepath.Join(other.dir, "peers", "1", "key"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(r.dir, "peers", "1", "key"), key, 0o600); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(exe, "peer", "--run", r.dir, "--peer", "1").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "the key of peer 1 is not the one in") {
		t.Errorf("%v\n%s", err, out)
	}
}

// Whoever reads the events may leave: the run is stopped, nothing stays
// behind.
func TestReaderLeaves(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd := exec.Command(exe, "train", "--json", "--model", "mlp", "--rounds", "100000", "--run", filepath.Join(t.TempDir(), "run"))
	cmd.Stdout, cmd.Stderr = w, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	var pids []int
	for lines := bufio.NewScanner(r); len(pids) < 4 && lines.Scan(); {
		var e spirt.Event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			t.Fatal(err)
		}
		if e.Event == "peer" && e.State == "started" {
			pids = append(pids, e.PID)
		}
	}
	r.Close()
	cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != spirt.ExitFailed || !strings.Contains(stderr.String(), "the run was stopped") {
		t.Errorf("exit code %d, standard error:\n%s", code, &stderr)
	}
	for _, pid := range pids {
		if syscall.Kill(pid, 0) == nil {
			t.Errorf("peer process %d still runs", pid)
		}
	}
}

// Ctrl-C stops the peers also when whoever reads the events, such as a pager,
// does not read on.
func TestInterruptWhileReaderPauses(t *testing.T) {
	r := startTrain(t, "--model", "logistic", "--peers", "2", "--rounds", "1000000")
	r.round(1, 1) // and then nothing is read
	deadline, tick := time.After(limit), time.Tick(20*time.Millisecond)
	pause := func(what string) {
		select {
		case <-tick:
		case <-deadline:
			t.Fatal("waited too long for ", what)
		}
	}
	events := filepath.Join(r.dir, "events.jsonl")
	for { // until there is more than the pipe and the scanner take
		if info, err := os.Stat(events); err == nil && info.Size() > 256<<10 {
			break
		}
		pause("events")
	}
	r.cmd.Process.Signal(os.Interrupt)
	for n, pid := range r.pids {
		for syscall.Kill(pid, 0) == nil && !zombie(pid) {
			pause("the end of peer " + strconv.Itoa(n))
		}
	}
	for r.events.Scan() {
	}
	r.cmd.Wait()
	if code := r.cmd.ProcessState.ExitCode(); code != spirt.ExitInterrupted {
		t.Errorf("exit code %d\n%s", code, r.stderr)
	}
}
