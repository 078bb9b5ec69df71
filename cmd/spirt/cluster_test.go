//go:build unix

package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spirt-ml/spirt"
	"github.com/spirt-ml/spirt/internal/membership"
	"github.com/spirt-ml/spirt/p2p"
)

// cluster is a job whose peers have folders of their own, as on several
// machines.
type cluster struct {
	t   *testing.T
	dir string
	exe string
}

func newCluster(t *testing.T, flags ...string) *cluster {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{t: t, dir: t.TempDir(), exe: exe}
	c.spirt(append(append([]string{"job", "create", "--listen", "127.0.0.1:0", "--name", "first"}, flags...), "home")...)
	return c
}

func (c *cluster) command(args ...string) *exec.Cmd {
	cmd := exec.Command(c.exe, args...)
	cmd.Dir = c.dir
	cmd.Env = append(os.Environ(), "SPIRT_TEST_MAIN=1")
	return cmd
}

// try runs a command to its end.
func (c *cluster) try(args ...string) (stdout, stderr string, err error) {
	c.t.Helper()
	cmd := c.command(args...)
	var out, diag bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &diag
	if err = cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	timer := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() })
	defer timer.Stop()
	err = cmd.Wait()
	return out.String(), diag.String(), err
}

// spirt runs a command that must succeed, and returns what it prints.
func (c *cluster) spirt(args ...string) string {
	c.t.Helper()
	stdout, stderr, err := c.try(args...)
	if err != nil {
		c.t.Fatalf("spirt %s: %v\n%s", strings.Join(args, " "), err, stderr)
	}
	return strings.TrimSpace(stdout)
}

// refused runs a command that must fail.
func (c *cluster) refused(says string, args ...string) {
	c.t.Helper()
	_, stderr, err := c.try(args...)
	if err == nil || !strings.Contains(stderr, says) {
		c.t.Errorf("spirt %s: %v, want %q\n%s", strings.Join(args[:1], " "), err, says, stderr)
	}
}

// process is a peer that runs.
type process struct {
	c    *cluster
	name string
	cmd  *exec.Cmd
	log  string // file
	end  chan error
}

// start runs a peer in the background.
func (c *cluster) start(name string, args ...string) *process {
	c.t.Helper()
	p := &process{c: c, name: name, cmd: c.command(args...), log: filepath.Join(c.dir, name+".log"), end: make(chan error, 1)}
	log, err := os.Create(p.log)
	if err != nil {
		c.t.Fatal(err)
	}
	defer log.Close()
	p.cmd.Stderr = log
	if err := p.cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	go func() { p.end <- p.cmd.Wait() }()
	c.t.Cleanup(func() {
		p.cmd.Process.Kill()
		if c.t.Failed() {
			b, _ := os.ReadFile(p.log)
			c.t.Logf("log of %s:\n%s", name, b[max(0, len(b)-1<<14):])
		}
	})
	return p
}

// wait waits for the end of a peer.
func (p *process) wait() error {
	p.c.t.Helper()
	select {
	case err := <-p.end:
		return err
	case <-time.After(limit):
		p.c.t.Fatalf("%s still runs", p.name)
		return nil
	}
}

// until polls the members as a folder knows them.
func (c *cluster) until(what, folder string, ok func(m spirt.MembersInfo) bool) {
	c.t.Helper()
	end := time.After(limit)
	for tick := time.NewTicker(50 * time.Millisecond); ; {
		if m, err := spirt.Members(filepath.Join(c.dir, folder)); err == nil && ok(m) {
			tick.Stop()
			return
		}
		select {
		case <-tick.C:
		case <-end:
			c.t.Fatalf("%s did not come about", what)
		}
	}
}

func (c *cluster) model(folder string) string {
	c.t.Helper()
	m, err := spirt.ReadModel(filepath.Join(c.dir, folder, "model.safetensors"))
	if err != nil {
		c.t.Fatal(err)
	}
	return m.Hash().String()
}

const here = "127.0.0.1:0"

// A job is made, two join with one invite, a third joins the running job by way
// of a member that has no admin key, and all end with one model. Invites that
// are not good are refused.
func TestCluster(t *testing.T) {
	c := newCluster(t, "--peers", "3", "--model", "mlp", "--rounds", clusterRounds)
	home := c.start("home", "peer", "home")
	invite := c.spirt("invite", "--uses", "2", "home")
	second := c.start("j2", "join", "--dir", "j2", "--name", "second", "--listen", here, invite)
	c.until("the second member", "home", func(m spirt.MembersInfo) bool { return len(m.Members) == 2 })
	late := c.spirt("invite", "--uses", "1", "--expires", "1s", "home")
	c.refused(`the name "second" is taken`, "join", "--dir", "other", "--name", "second", "--listen", here, invite)
	third := c.start("j3", "join", "--dir", "j3", "--name", "third", "--listen", here, invite)
	c.until("the start", "home", func(m spirt.MembersInfo) bool { return m.Started })

	fourth := c.start("j4", "join", "--dir", "j4", "--name", "fourth", "--listen", here, c.byWayOf("j2"))
	c.until("the fourth member", "j3", func(m spirt.MembersInfo) bool { return len(m.Members) == 4 && m.Members[3].Round > 0 })
	c.refused("was used 2 times", "join", "--dir", "other", "--listen", here, invite)
	c.refused("expired on", "join", "--dir", "another", "--listen", here, late)
	c.refused("is of job", "join", "--dir", "j2", c.foreign())
	for _, p := range []*process{home, second, third, fourth} {
		if err := p.wait(); err != nil {
			t.Errorf("%s: %v", p.name, err)
		}
	}
	want := c.model("home")
	for _, folder := range []string{"j2", "j3", "j4"} {
		if got := c.model(folder); got != want {
			t.Errorf("%s ended with the model %s, home with %s", folder, got, want)
		}
	}
}

// byWayOf is an invite that names only one peer, of another folder.
func (c *cluster) byWayOf(folder string) string {
	t := c.t
	t.Helper()
	m, err := spirt.Members(filepath.Join(c.dir, folder))
	if err != nil {
		t.Fatal(err)
	}
	i, err := membership.ParseInvite(c.spirt("invite", "home"))
	if err != nil {
		t.Fatal(err)
	}
	i.Contacts = nil
	for _, x := range m.Members {
		if key, err := p2p.PeerID(x.ID).PublicKey(); err == nil && x.Own {
			i.Contacts = []membership.Contact{{Key: key, Addresses: x.Addresses}}
		}
	}
	b, err := os.ReadFile(filepath.Join(c.dir, "home", "genesis"))
	if err != nil {
		t.Fatal(err)
	}
	g, err := membership.DecodeGenesis(b)
	if err != nil {
		t.Fatal(err)
	}
	admin, err := p2p.LoadKey(filepath.Join(c.dir, "home", "admin.key"))
	if err != nil {
		t.Fatal(err)
	}
	if err := i.Sign(g, admin); err != nil {
		t.Fatal(err)
	}
	return i.String()
}

// foreign is an invite to another job.
func (c *cluster) foreign() string {
	c.t.Helper()
	return newCluster(c.t, "--model", "logistic").spirt("invite", "home")
}

// A member gets a new key, one is expelled and one leaves while training goes
// on.
func TestClusterChanges(t *testing.T) {
	c := newCluster(t, "--peers", "4", "--model", "mlp", "--rounds", "100000")
	home := c.start("home", "peer", "home")
	invite := c.spirt("invite", "--uses", "3", "home")
	var others []*process
	for _, name := range []string{"j2", "j3", "j4"} {
		others = append(others, c.start(name, "join", "--dir", name, "--name", name, "--listen", here, invite))
	}
	number := func(name string) (n int, id string) {
		m, err := spirt.Members(filepath.Join(c.dir, "home"))
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range m.Members {
			if x.Name == name {
				n, id = x.Peer, x.ID
			}
		}
		return n, id
	}
	// round waits until a member takes part in a round beyond the last one.
	last := uint64(0)
	takesPart := func(name string) {
		t.Helper()
		c.until(name+" taking part", "home", func(m spirt.MembersInfo) bool {
			for _, x := range m.Members {
				if x.Name == name && x.Round > last {
					last = x.Round
					return true
				}
			}
			return false
		})
	}
	takesPart("j2")
	before, old := number("j2")
	c.spirt("rotate-key", "j2")
	for {
		if n, id := number("j2"); id != old {
			if n != before {
				t.Errorf("with its new key peer %d is peer %d", before, n)
			}
			break
		}
	}
	last += 20
	takesPart("j2")

	c.spirt("expel", "home", "j4")
	if err := others[2].wait(); err == nil {
		t.Error("the expelled peer ended well")
	}
	if b, _ := os.ReadFile(others[2].log); !strings.Contains(string(b), "not on the roster of the job any more") {
		t.Error("the expelled peer does not say why it ended")
	}
	c.refused("join with another folder", "join", "--dir", "j4", "--listen", here, c.spirt("invite", "home"))
	c.spirt("leave", "j3")
	if err := others[1].wait(); err == nil {
		t.Error("the peer that left ended as if it had finished")
	}
	last += 20
	takesPart("first")
	m, err := spirt.Members(filepath.Join(c.dir, "j2"))
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Members) != 2 || m.Epoch < 5 {
		b, _ := json.Marshal(m)
		t.Errorf("%s", b)
	}
	home.cmd.Process.Signal(os.Interrupt)
	others[0].cmd.Process.Signal(os.Interrupt)
	for _, p := range []*process{home, others[0]} {
		if err := p.wait(); p.cmd.ProcessState.ExitCode() != spirt.ExitInterrupted {
			t.Errorf("%s: %v", p.name, err)
		}
	}
}

// Somebody runs a copy of a member's folder, its key in it, beside the member
// itself, as happens to cloned SD cards: the others see that the key signs what no honest peer signs,
// expel it, and go on.
func TestCopiedIdentity(t *testing.T) {
	c := newCluster(t, "--peers", "4", "--model", "mlp", "--rounds", "100000")
	c.start("home", "peer", "home")
	invite := c.spirt("invite", "--uses", "3", "home")
	for _, name := range []string{"j2", "j3", "j4"} {
		c.start(name, "join", "--dir", name, "--name", name, "--listen", here, invite)
	}
	member := func(m spirt.MembersInfo) (j2, j3 spirt.MemberInfo) {
		for _, x := range m.Members {
			switch x.Name {
			case "j2":
				j2 = x
			case "j3":
				j3 = x
			}
		}
		return j2, j3
	}
	c.until("a checkpoint", "home", func(m spirt.MembersInfo) bool {
		j2, j3 := member(m)
		return j2.Round > 55 && j3.Round > 55
	})
	if out, err := exec.Command("cp", "-Rp", filepath.Join(c.dir, "j2"), filepath.Join(c.dir, "copy")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	c.start("copy", "peer", "--listen", here, "copy")
	last := uint64(0)
	c.until("the expulsion", "home", func(m spirt.MembersInfo) bool {
		j2, j3 := member(m)
		last = j3.Round
		return j2.State == "expelled"
	})
	c.until("rounds without it", "home", func(m spirt.MembersInfo) bool {
		j2, j3 := member(m)
		return j3.Round > last+20 && j2.Round <= last+2
	})
}
