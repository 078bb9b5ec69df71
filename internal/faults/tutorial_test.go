//go:build integration && linux

package faults

import (
	"encoding/json"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/spirt-ml/spirt"
)

// The commands of docs/tutorial-cluster.md on four machines, of which the Pi
// has an eighth of a CPU. Only the job is shorter.
func TestTutorial(t *testing.T) {
	const rounds = 100
	c := emptyCluster(t, 4)
	c.net.slow(4, 0.125)
	home := t.TempDir()
	c.dir = filepath.Join(home, "home")
	spirtAt := func(machine int, args ...string) *exec.Cmd {
		cmd := c.net.on(machine, c.exe, args...)
		cmd.Dir = c.peers[machine-1].cwd
		return cmd
	}
	for n := 1; n <= 4; n++ {
		c.peers = append(c.peers, &peer{c: c, n: n, machine: n, cwd: t.TempDir()})
	}
	first := c.peer(1)
	first.cwd, first.run = home, c.dir

	must(t, spirtAt(1, "job", "create", "--peers", "4", "--batches-per-round", "8", "--name", "laptop-1", "--rounds", strconv.Itoa(rounds), "home"))
	first.execute("peer", "home")
	invite, err := spirtAt(1, "invite", "--uses", "3", "home").Output()
	if err != nil {
		t.Fatal("spirt invite: ", err)
	}
	for i, name := range []string{"laptop-2", "laptop-3", "pi"} {
		c.peer(i+2).execute("join", "--name", name, strings.TrimSpace(string(invite)))
	}
	said := regexp.MustCompile(`this is peer (\d) of the job in (\S+)`)
	for _, p := range c.peers[1:] {
		poll(t, "a machine to join", func() bool {
			p.mustRun()
			m := said.FindStringSubmatch(p.logged())
			if m != nil {
				p.n, _ = strconv.Atoi(m[1]) // in the order in which they came
				p.run = filepath.Join(p.cwd, m[2])
			}
			return m != nil
		})
	}
	for _, p := range c.peers {
		p.log = &eventLog{path: filepath.Join(p.run, "events.jsonl")}
	}
	reach := func(p *peer, round uint64) {
		t.Helper()
		poll(t, "round "+strconv.FormatUint(round, 10), func() bool { p.mustRun(); return p.last().Round >= round })
	}
	reach(first, 10)

	out, err := spirtAt(1, "peers", "--json", "home").Output()
	if err != nil {
		t.Fatal("spirt peers: ", err)
	}
	var list struct {
		Members []struct {
			Name        string
			Minibatches int
		}
	}
	if err := json.Unmarshal(out, &list); err != nil {
		t.Fatal(err)
	}
	share := map[string]int{}
	for _, m := range list.Members {
		share[m.Name] = m.Minibatches
	}
	t.Logf("minibatches of a round: %v", share)
	if len(share) != 4 || share["pi"] < 1 || share["pi"] >= share["laptop-1"] {
		t.Error("the Pi computes as much as others, or nothing")
	}

	first.signal(syscall.SIGINT)
	if err := first.wait(); err == nil {
		t.Error("Ctrl-C ended the peer as if it was done")
	}
	at := c.peer(4).last().Round
	reach(c.peer(4), at+10) // without the first
	first.execute("peer", "home")

	model := ""
	for _, p := range c.peers {
		if err := p.wait(); err != nil {
			t.Errorf("machine %d: %v", p.machine, err)
		}
		out, err := spirtAt(p.machine, "eval", "--json", "--run", p.run).Output()
		if err != nil {
			t.Fatal("spirt eval: ", err)
		}
		var e spirt.Event
		if err := json.Unmarshal(out, &e); err != nil {
			t.Fatal(err)
		}
		t.Logf("machine %d: accuracy %.4f, model %.12s", p.machine, *e.Accuracy, e.Model)
		if model == "" {
			model = e.Model
		}
		if e.Model != model || *e.Accuracy < 0.9 {
			t.Errorf("machine %d has the model %s with accuracy %.4f, machine 1 has %s", p.machine, e.Model, *e.Accuracy, model)
		}
	}
}
