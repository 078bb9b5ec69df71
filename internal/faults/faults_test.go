//go:build integration && linux

package faults

import (
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spirt-ml/spirt"
)

// small is a job for tests that are about something else than its model.
func small(rounds int) spirt.Job {
	return spirt.Job{Model: "logistic", Rounds: rounds, CheckpointEvery: 10}
}

// promised is the accuracy of the main job on the test samples.
const promised = 0.97

// The main job, while peers are killed and started again at random every few
// seconds, the network falls in two halves for 20 s, and a fifth peer joins
// half-way.
func TestMainJob(t *testing.T) {
	c := newJob(t, 5)
	c.net.delay(15 * time.Millisecond) // else all would be over too soon
	for range 3 {
		c.join()
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	c.reach(1, 20)

	const partitionAt, last = 60, 300 // rounds; from last on nobody is killed, so that all are there at the end
	partitioned, healAt := false, time.Time{}
	for kills := 0; ; kills++ {
		c.while(3*time.Second + time.Duration(rng.Int64N(int64(2*time.Second))))
		victim := c.peer(1 + rng.IntN(4))
		round := victim.last().Round
		switch {
		case !partitioned && round > partitionAt:
			c.net.partition([]int{1, 2}, []int{3, 4})
			partitioned, healAt = true, time.Now().Add(20*time.Second)
		case partitioned && !healAt.IsZero() && time.Now().After(healAt):
			c.net.heal()
			healAt = time.Time{}
		}
		if round > 200 && healAt.IsZero() && len(c.peers) == 4 {
			c.join()
			t.Logf("peer 5 joined at round %d", c.log.last(1).Round)
		}
		if round > last && partitioned && healAt.IsZero() {
			t.Logf("%d kills", kills)
			break
		}
		victim.kill()
		victim.start()
	}
	if len(c.peers) != 5 {
		t.Error("the fifth peer did not join")
	}
	if accuracy := c.finish(400); accuracy < promised {
		t.Errorf("accuracy %.4f", accuracy)
	}
}

// Slow and broken links: all that is sent arrives 50 ms later, one peer has a
// line of 1 Mbit/s, and what one sends to another is lost for a while.
func TestLinks(t *testing.T) {
	const rounds = 24
	c := newCluster(t, small(rounds))
	c.net.delay(50 * time.Millisecond)
	c.net.limit(4, "1mbit")
	c.start()
	c.reach(2, 6)
	c.net.cut(1, 2)
	poll(t, "the loss of a connection", func() bool {
		return c.log.has(func(e spirt.Event) bool { return e.State == "lost" && e.Peer == 1 && e.By == 2 })
	})
	at := max(c.log.last(1).Round, c.log.last(2).Round)
	c.reach(1, at+3)
	c.reach(2, at+3)
	c.net.heal()
	c.finish(rounds)
}

// One peer is stopped for 6 s, as by a laptop's lid, and the disk of another
// is full for a while: it says so and ends, and goes on when there is space.
func TestMachines(t *testing.T) {
	const rounds = 110
	c := newCluster(t, small(rounds))
	c.net.delay(20 * time.Millisecond)
	asleep, full := c.peer(2), c.peer(3)
	fill := full.smallDisk("1m")
	c.start()
	c.reach(3, 15)

	asleep.signal(syscall.SIGSTOP)
	free := fill()
	if err := full.wait(); err == nil || !strings.Contains(full.logged(), "no space left on device") {
		t.Errorf("the peer with the full disk ended with %v", err)
	}
	c.while(6 * time.Second)
	asleep.signal(syscall.SIGCONT)
	at := c.log.last(1).Round
	if at < 20 {
		t.Errorf("the others only got to round %d", at)
	}
	c.reach(2, at+5)
	free()
	full.start()
	c.finish(rounds)
}

// smallDisk gives the peer's folder a file system of its own, of a size of
// mount. fill takes what is left of it until free is called.
func (p *peer) smallDisk(size string) (fill func() (free func())) {
	t := p.c.t
	t.Helper()
	aside := filepath.Join(t.TempDir(), "peer")
	must(t, exec.Command("cp", "-a", p.dir(), aside))
	if err := syscall.Mount("tmpfs", p.dir(), "tmpfs", 0, "size="+size); err != nil {
		t.Fatal("mounting a small disk: ", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(p.dir(), syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	must(t, exec.Command("cp", "-a", aside+"/.", p.dir()))
	return func() func() {
		t.Helper()
		path := filepath.Join(p.dir(), "ballast")
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(f, zeros{}); !errors.Is(err, syscall.ENOSPC) {
			t.Fatal("filling the disk: ", err)
		}
		return func() {
			if err := errors.Join(f.Close(), os.Remove(path)); err != nil {
				t.Fatal(err)
			}
		}
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// One of four finishes alone, and says that it did.
func TestSurvivor(t *testing.T) {
	const rounds = 60
	c := newCluster(t, small(rounds))
	c.start()
	for i, n := range []int{1, 2, 4} {
		c.reach(n, uint64(10*(i+1)))
		c.peer(n).kill()
	}
	c.finish(rounds)
	if last := c.log.last(3); !last.Degraded || !slices.Equal(last.Members, []int{3}) {
		t.Errorf("the last round of the survivor is %+v", last)
	}
}

// A copy of a peer's folder, its key included, is started on another machine.
// The two contradict each other, which is proven, and the others go on without
// them.
func TestCopiedIdentity(t *testing.T) {
	const rounds = 100
	c := newCluster(t, small(rounds))
	c.net.delay(15 * time.Millisecond)
	c.start()
	c.reach(1, 10)
	copied := &peer{c: c, n: 4, run: filepath.Join(t.TempDir(), "copy"), machine: 5, log: c.log}
	must(t, exec.Command("cp", "-a", c.dir, copied.run))
	copied.start()
	for by := 1; by <= 3; by++ {
		poll(t, "the expulsion of peer 4", func() bool {
			return c.log.has(func(e spirt.Event) bool { return e.State == "expelled" && e.Peer == 4 && e.By == by })
		})
	}
	copied.kill()
	c.peer(4).kill()
	c.finish(rounds)
	for by := 1; by <= 3; by++ {
		c.without(by, 4)
	}
}

// without fails unless a peer takes nothing of another, which it expelled,
// into more than the round that was under way.
func (c *cluster) without(by, expelled int) {
	c.t.Helper()
	at, last := uint64(0), uint64(0)
	round := uint64(0)
	for _, e := range c.log.all() {
		switch {
		case e.State == "expelled" && e.Peer == expelled && e.By == by:
			at = round
			c.t.Logf("peer %d expelled peer %d at round %d: %s", by, expelled, round, e.Message)
		case e.Event == "round" && e.Peer == by:
			if round = e.Round; slices.Contains(e.Members, expelled) {
				last = round
			}
		}
	}
	if last > at+1 {
		c.t.Errorf("peer %d expelled peer %d at round %d, and took its gradient into round %d", by, expelled, at, last)
	}
}
