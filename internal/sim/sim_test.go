package sim

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/internal/round"
)

var (
	seeds = flag.Int("seeds", defaultSeeds, "simulated runs in TestChaos (a sixth with -short)")
	first = flag.Uint64("seed", 1, "first seed of TestChaos")
)

// failing runs a failing plan again, with a trace.
func failing(t *testing.T, cfg Config, err error) {
	t.Helper()
	var trace bytes.Buffer
	cfg.Trace = &trace
	Run(cfg)
	save := func(what string, b []byte) string {
		name := filepath.Join(os.TempDir(), fmt.Sprintf("spirt-seed-%d.%s", cfg.Seed, what))
		if err := os.WriteFile(name, b, 0o600); err != nil {
			return err.Error()
		}
		return name
	}
	lines := bytes.SplitAfter(trace.Bytes(), []byte("\n"))
	lines = lines[max(0, len(lines)-60):]
	t.Errorf("%v\nreplay: spirt simulate --trace --scenario %s\nwhole trace: %s\nits last lines:\n%s", err,
		save("scenario", Format(cfg, err.Error())), save("trace", trace.Bytes()), bytes.Join(lines, nil))
}

// mixed draws a plan for one to seven peers.
func mixed(seed uint64) Config {
	return chaos(seed, []int{1, 2, 3, 4, 4, 4, 4, 5, 7}[seed%9])
}

func TestChaos(t *testing.T) {
	n := *seeds
	if testing.Short() {
		n /= 6
	}
	var worst time.Duration
	failed := 0
	for i := range n {
		cfg := mixed(*first + uint64(i))
		res, err := Run(cfg)
		if err != nil {
			failed++
			if failed == 1 {
				failing(t, cfg, err)
			} else {
				t.Error(err)
			}
			continue
		}
		worst = max(worst, res.Met)
	}
	t.Logf("%d seeds, heads met at the latest %v after all faults healed", n, worst)
}

// rolling draws four peers of which one is killed every three to five seconds,
// and back in half a second, while the network is in two halves for 20 s. So
// that less work is lost than all of a partition, what is justified is old.
func rolling(seed uint64) Config {
	r := rand.New(rand.NewPCG(seed, 99))
	c := Config{Seed: seed, Peers: 4, F: 1, Delay: 20 * time.Millisecond, Chaos: 90 * time.Second, CheckpointEvery: []uint64{8, 50}[seed%2]}
	c.Faults = []Fault{{At: 6 * time.Second, Kind: Partition, For: 20 * time.Second, Parts: [][]int{{0, 1}, {2, 3}}}}
	for at := 4 * time.Second; at < c.Chaos; at += 3*time.Second + time.Duration(r.Int64N(int64(2*time.Second))) {
		c.Faults = append(c.Faults, Fault{At: at, Kind: Crash, Peer: r.IntN(4), For: 200*time.Millisecond + time.Duration(r.Int64N(int64(400*time.Millisecond)))})
	}
	return c
}

// Peers that are killed all the time still get on: the run is never for long
// where it had been before (P14). Rounds take a fifth of a second here.
func TestRollingKills(t *testing.T) {
	n := max(1, *seeds/20)
	var worst time.Duration
	heights := uint64(0)
	for i := range n {
		cfg := rolling(*first + uint64(i))
		res, err := Run(cfg)
		if err == nil && res.Stall > 20*time.Second {
			err = fmt.Errorf("seed %d: for %v no peer was further than one had been before: heights %v", cfg.Seed, res.Stall, res.Heights)
		}
		if err != nil {
			failing(t, cfg, err)
			return
		}
		worst = max(worst, res.Stall)
		heights += res.Heights[0]
	}
	t.Logf("%d seeds: %d rounds a run, at most %v without getting further", n, heights/uint64(max(n, 1)), worst)
}

func TestSameSeedSameTrace(t *testing.T) {
	for seed := range uint64(5) {
		cfg := mixed(seed + 100)
		var a, b bytes.Buffer
		cfg.Trace = &a
		ra, _ := Run(cfg)
		cfg.Trace = &b
		rb, _ := Run(cfg)
		if !bytes.Equal(a.Bytes(), b.Bytes()) || ra.Digest != rb.Digest {
			t.Errorf("seed %d: two runs differ", cfg.Seed)
		}
		cfg.Trace = io.Discard
	}
}

// Without faults all sets are all peers, whatever the order of arrival, and
// so the last record is the same in every run.
func TestNoFaultsNoChoice(t *testing.T) {
	for _, n := range []int{1, 2, 3, 4, 7} {
		var last round.Hash
		for seed := range uint64(8) {
			cfg := Config{Seed: seed, Peers: n, F: round.MaxFaulty(n), Rounds: 12, Delay: 60 * time.Millisecond, Duplicate: .2}
			cfg.Timeouts = Timeouts()
			cfg.Timeouts.Start = 5 * time.Second
			cfg.Timeouts.GradientMin = time.Second
			cfg.Timeouts.GradientMax, cfg.Timeouts.BallotMin, cfg.Timeouts.BallotMax = 5*time.Second, time.Second, 5*time.Second
			res, err := Run(cfg)
			if err != nil {
				failing(t, cfg, err)
				return
			}
			if res.Timeouts > 0 || res.Lost > 0 {
				t.Fatalf("n %d seed %d: %d timeouts, %d lost", n, seed, res.Timeouts, res.Lost)
			}
			for h, set := range res.Sets {
				if len(set) != n {
					t.Fatalf("n %d seed %d height %d: set %v", n, seed, h+1, set)
				}
			}
			for p, id := range res.Finished {
				if id != res.Finished[0] {
					t.Fatalf("n %d seed %d: peer %d finished elsewhere", n, seed, p)
				}
			}
			// Slots may differ between runs only if one failed.
			if seed > 0 && res.Finished[0] != last {
				t.Fatalf("n %d seed %d: another last record than with seed 0", n, seed)
			}
			last = res.Finished[0]
		}
	}
}

// Peers that find at different times that a budget is spent stop at the same
// record, under faults too, and not because one of them says so.
func TestAgreedStop(t *testing.T) {
	for seed := range uint64(60) {
		cfg := mixed(seed + 3000)
		cfg.Rounds, cfg.Budget = 1000, 20
		cfg.Settle = 60 * time.Second
		res, err := Run(cfg)
		if err != nil {
			failing(t, cfg, err)
			return
		}
		ended := map[round.Hash]bool{}
		for p, id := range res.Finished {
			if id != (round.Hash{}) {
				ended[id] = true
				if h := res.Ends[p]; h < 20 || h == 1000 {
					t.Errorf("seed %d: peer %d stopped at height %d", seed, p, h)
				}
			}
		}
		if len(ended) != 1 {
			t.Errorf("seed %d: the peers stopped at %d records, heights %v", seed, len(ended), res.Ends)
		}
	}
}

func TestFinishWithFaults(t *testing.T) {
	for seed := range uint64(30) {
		cfg := mixed(seed + 1000)
		cfg.Rounds = 40
		cfg.Settle = 60 * time.Second
		res, err := Run(cfg)
		if err != nil {
			failing(t, cfg, err)
			return
		}
		_ = res
	}
}

// Liars, no more than f of them, neither stop the honest peers nor make them
// take a model that does not follow (P14, P2).
func TestLiars(t *testing.T) {
	n := max(1, *seeds/20)
	var worst time.Duration
	for i := range n {
		seed := *first + uint64(i)
		cfg := liars(seed, 4, 1)
		if seed%3 == 0 {
			cfg = liars(seed, 7, 2)
		}
		res, err := Run(cfg)
		if err != nil {
			failing(t, cfg, err)
			return
		}
		worst = max(worst, res.Met)
	}
	t.Logf("%d seeds, heads met at the latest %v after the last other fault", n, worst)
}

// What is final stays final (P1, P10), also with all f liars at work on both
// sides of a partition.
func TestFinality(t *testing.T) {
	n := *seeds / 2
	if testing.Short() {
		n /= 6
	}
	var final, highest uint64
	for i := range n {
		n := []int{4, 7, 10}[i%3]
		cfg := finality(*first+uint64(i), n, round.MaxFaulty(n))
		res, err := Run(cfg)
		if err != nil {
			failing(t, cfg, err)
			return
		}
		if res.Final > 0 {
			final++
		}
		highest = max(highest, res.Final)
	}
	if int(final) < n/3 {
		t.Errorf("something became final in %d of %d runs only", final, n)
	}
	t.Logf("%d seeds, something final in %d, up to height %d", n, final, highest)
}

// Without faults everything but the newest two checkpoints is final.
func TestFinalityWithoutFaults(t *testing.T) {
	for _, n := range []int{1, 2, 4, 7} {
		cfg := Config{Seed: uint64(n), Peers: n, F: round.MaxFaulty(n), Rounds: 40, CheckpointEvery: 4}
		res, err := Run(cfg)
		if err != nil {
			failing(t, cfg, err)
			return
		}
		if res.Final < 28 {
			t.Errorf("%d peers: final up to %d of 40", n, res.Final)
		}
	}
}

// However many lie together, no honest peer signs what does not follow.
func TestTooManyLiars(t *testing.T) {
	for seed := range uint64(20) {
		cfg := Config{Seed: seed, Peers: 4, F: 1, Liars: []int{1, 2}, Rounds: 10, Chaos: 2 * time.Second, Settle: time.Second}
		if _, err := Run(cfg); err != nil && !strings.Contains(err.Error(), "P14") {
			failing(t, cfg, err)
			return
		}
	}
}

// A peer that crashes and restarts from an old checkpoint is back in the sets
// before long, though the others do not wait for it meanwhile.
func TestRestartedPeerIsBack(t *testing.T) {
	for seed := range uint64(20) {
		cfg := Config{Seed: seed, Peers: 4, F: 1, Draw: Draw{Crashes: 1}, Chaos: 2 * time.Second, Rounds: 100}
		cfg.Settle = 30 * time.Second
		res, err := Run(cfg)
		if err != nil {
			failing(t, cfg, err)
			return
		}
		for _, set := range res.Sets[len(res.Sets)-20:] {
			if len(set) != 4 {
				t.Errorf("seed %d: set %v near the end", seed, set)
				break
			}
		}
	}
}

// A lone survivor goes on, degraded (P7).
func TestLoneSurvivor(t *testing.T) {
	for seed := range uint64(10) {
		cfg := Config{Seed: seed, Peers: 4, F: 1, Chaos: 2 * time.Second, Draw: Draw{Dead: []int{0, 1, 3}}}
		res, err := Run(cfg)
		if err != nil {
			failing(t, cfg, err)
			return
		}
		if res.Heights[2] < 5 {
			t.Errorf("seed %d: %v", seed, res.Heights)
		}
	}
}

func Example() {
	res, err := Run(Config{Seed: 1, Peers: 4, F: 1, Rounds: 5})
	fmt.Println(res.Heights, res.Timeouts, err)
	// Output: [5 5 5 5] 0 <nil>
}
