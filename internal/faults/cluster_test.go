//go:build integration && linux

package faults

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spirt-ml/spirt"
)

// build builds the program as users run it, once for all tests.
var build = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "spirt-faults-")
	if err != nil {
		return "", err
	}
	exe := filepath.Join(dir, "spirt")
	out, err := exec.Command("go", "build", "-o", exe, "../../cmd/spirt").CombinedOutput()
	if err != nil {
		return "", errors.New(string(out))
	}
	return exe, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if exe, err := build(); err == nil {
		os.RemoveAll(filepath.Dir(exe))
	}
	os.Exit(code)
}

// cluster is a run whose peers are processes on machines of a network.
type cluster struct {
	t     *testing.T
	net   *network
	exe   string
	dir   string // the run folder, or that of the first peer
	log   *eventLog
	peers []*peer
}

func emptyCluster(t *testing.T, machines int) *cluster {
	t.Helper()
	exe, err := build()
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{t: t, net: newNetwork(t, machines), exe: exe, dir: filepath.Join(t.TempDir(), "run")}
	c.log = &eventLog{path: filepath.Join(c.dir, "events.jsonl")}
	t.Cleanup(func() {
		for _, p := range c.peers {
			if p.running() {
				p.kill()
			}
			if t.Failed() {
				p.tell()
			}
		}
	})
	return c
}

// newCluster makes a network, with a machine to spare, and the folder of a run
// that all peers share. No peer runs yet.
func newCluster(t *testing.T, job spirt.Job) *cluster {
	t.Helper()
	if err := job.Resolve(); err != nil {
		t.Fatal(err)
	}
	c := emptyCluster(t, job.Peers+1)
	// Train makes the folder. Its peers do nothing and leave no model, which
	// it reports; those of the test come instead of them.
	if _, err := spirt.Train(t.Context(), job, spirt.TrainConfig{Dir: c.dir, Executable: "/bin/true"}); !errors.Is(err, os.ErrNotExist) {
		t.Fatal("making the run folder: ", err)
	}
	if err := os.Remove(c.log.path); err != nil {
		t.Fatal(err)
	}
	for n := 1; n <= job.Peers; n++ {
		c.peers = append(c.peers, &peer{c: c, n: n, run: c.dir, machine: n, log: c.log})
	}
	return c
}

// newJob makes a network and, on its first machine, a job as people do, with
// these flags, for four peers. That machine's peer runs.
func newJob(t *testing.T, machines int, flags ...string) *cluster {
	t.Helper()
	c := emptyCluster(t, machines)
	args := append([]string{"job", "create", "--listen", listen(1)}, flags...)
	must(t, c.net.on(1, c.exe, append(args, c.dir)...))
	p := &peer{c: c, n: 1, run: c.dir, machine: 1, log: c.log}
	c.peers = append(c.peers, p)
	p.start()
	return c
}

// join has the next machine join the job of the first, and waits until it is a
// member.
func (c *cluster) join() *peer {
	t, n := c.t, len(c.peers)+1
	t.Helper()
	invite, err := c.net.on(1, c.exe, "invite", c.dir).Output()
	if err != nil {
		t.Fatalf("spirt invite: %v", err)
	}
	dir := filepath.Join(t.TempDir(), "joined")
	p := &peer{c: c, n: n, run: dir, machine: n, log: &eventLog{path: filepath.Join(dir, "events.jsonl")}}
	c.peers = append(c.peers, p)
	p.execute("join", "--dir", dir, "--listen", listen(n), strings.TrimSpace(string(invite)))
	poll(t, "peer "+strconv.Itoa(n)+" to be a member", func() bool {
		p.mustRun()
		return strings.Contains(p.logged(), "this is peer "+strconv.Itoa(n)+" ")
	})
	return p
}

func listen(machine int) string { return ip(machine) + ":" + strconv.Itoa(port) }

// peer returns peer n, from 1.
func (c *cluster) peer(n int) *peer { return c.peers[n-1] }

// start starts all peers.
func (c *cluster) start() {
	c.t.Helper()
	for _, p := range c.peers {
		p.start()
	}
}

// reach waits until a peer has got to a round.
func (c *cluster) reach(peer int, round uint64) {
	c.t.Helper()
	poll(c.t, "round "+strconv.FormatUint(round, 10)+" of peer "+strconv.Itoa(peer), func() bool {
		c.peer(peer).mustRun()
		return c.peer(peer).last().Round >= round
	})
}

// while waits for d, in which all goes on.
func (c *cluster) while(d time.Duration) {
	c.t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		for _, p := range c.peers {
			if p.running() {
				p.mustRun()
			}
		}
	}
}

// finish waits for the end of all peers that run, and fails unless they end
// well, with one model after that many rounds. It returns the model's accuracy
// on the test samples.
func (c *cluster) finish(rounds uint64) float64 {
	c.t.Helper()
	model := ""
	for _, p := range c.peers {
		if p.cmd == nil {
			continue
		}
		if err := p.wait(); err != nil {
			c.t.Errorf("peer %d ended with %v", p.n, err)
		}
		last := p.last()
		if last.Round != rounds {
			c.t.Errorf("peer %d ended with round %d, not %d", p.n, last.Round, rounds)
		}
		if model == "" {
			model = last.Model
		}
		if last.Model != model {
			c.t.Errorf("peer %d ended with the model %s, others with %s", p.n, last.Model, model)
		}
	}
	e, err := spirt.Eval(c.dir, "")
	if err != nil {
		c.t.Fatal(err)
	}
	if e.Model != model {
		c.t.Errorf("the run folder has the model %s, the peers ended with %s", e.Model, model)
	}
	return *e.Accuracy
}

// peer is one peer and the process that runs it, if one does.
type peer struct {
	c       *cluster
	n       int    // its number in the run
	run     string // its run folder
	machine int
	log     *eventLog // of the run folder
	cwd     string    // where its commands run; empty: where the tests do

	cmd   *exec.Cmd  // nil unless a process was started and not yet waited for
	ended chan error // has its end
}

// dir is the peer's folder.
func (p *peer) dir() string { return filepath.Join(p.run, "peers", strconv.Itoa(p.n)) }

// start starts the peer's process.
func (p *peer) start() {
	p.c.t.Helper()
	p.execute("peer", "--run", p.run, "--peer", strconv.Itoa(p.n), "--listen", listen(p.machine))
}

// execute runs spirt as the peer's process.
func (p *peer) execute(args ...string) {
	t := p.c.t
	t.Helper()
	log, err := os.OpenFile(p.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close() // the process has its own
	p.cmd = p.c.net.on(p.machine, p.c.exe, args...)
	p.cmd.Dir = p.cwd
	p.cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
	p.cmd.Stdout, p.cmd.Stderr = log, log
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.ended = make(chan error, 1)
	go func() { p.ended <- p.cmd.Wait() }() // ends with the process
}

func (p *peer) logFile() string { return filepath.Join(p.c.dir, "log-"+strconv.Itoa(p.machine)) }

// last returns the peer's last round.
func (p *peer) last() spirt.Event { return p.log.last(p.n) }

func (p *peer) running() bool { return p.cmd != nil }

// mustRun fails if the process has ended by itself.
func (p *peer) mustRun() {
	p.c.t.Helper()
	select {
	case err := <-p.ended:
		p.ended <- err
		if err != nil || p.last().Round == 0 {
			p.c.t.Fatalf("peer %d ended: %v", p.n, err)
		}
	default:
	}
}

func (p *peer) signal(s syscall.Signal) {
	if err := p.cmd.Process.Signal(s); err != nil {
		p.c.t.Errorf("signal %v to peer %d: %v", s, p.n, err)
	}
}

// wait returns how the process ended.
func (p *peer) wait() error {
	p.c.t.Helper()
	select {
	case err := <-p.ended:
		p.cmd = nil
		return err
	case <-time.After(patience):
		p.c.t.Fatalf("peer %d still runs", p.n)
		return nil
	}
}

// kill ends the process as kill -9 does.
func (p *peer) kill() {
	p.cmd.Process.Kill() // it may have ended
	p.wait()
}

// logged returns what the peer's processes wrote.
func (p *peer) logged() string {
	b, err := os.ReadFile(p.logFile())
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// tell writes the end of the peer's log into that of the test.
func (p *peer) tell() {
	text := p.logged()
	p.c.t.Logf("end of the log of peer %d:\n%s", p.n, text[max(0, len(text)-4096):])
}

// eventLog reads the events of a run while they are written.
type eventLog struct {
	path   string
	at     int64
	events []spirt.Event
}

// all returns the events that are complete by now.
func (l *eventLog) all() []spirt.Event {
	f, err := os.Open(l.path)
	if err != nil {
		return nil // no peer has written yet
	}
	defer f.Close()
	b, err := io.ReadAll(io.NewSectionReader(f, l.at, 1<<30))
	if err != nil {
		return l.events
	}
	b = b[:bytes.LastIndexByte(b, '\n')+1]
	l.at += int64(len(b))
	for line := range bytes.Lines(b) {
		var e spirt.Event
		if json.Unmarshal(line, &e) == nil { // a full disk may tear one
			l.events = append(l.events, e)
		}
	}
	return l.events
}

// last returns the last round of a peer.
func (l *eventLog) last(peer int) spirt.Event {
	for _, e := range slices.Backward(l.all()) {
		if e.Event == "round" && e.Peer == peer {
			return e
		}
	}
	return spirt.Event{}
}

// has reports whether there is an event by now for which ok returns true.
func (l *eventLog) has(ok func(e spirt.Event) bool) bool { return slices.ContainsFunc(l.all(), ok) }
