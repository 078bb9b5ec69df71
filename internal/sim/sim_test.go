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
	seeds = flag.Int("seeds", 200, "simulated runs in TestChaos (a sixth with -short)")
	first = flag.Uint64("seed", 1, "first seed of TestChaos")
)

// chaos draws a fault plan from a seed.
func chaos(seed uint64) Config {
	r := rand.New(rand.NewPCG(seed, 77))
	n := []int{1, 2, 3, 4, 4, 4, 4, 5, 7}[r.IntN(9)]
	cfg := Config{
		Seed: seed, Peers: n, F: round.MaxFaulty(n), Chaos: 4 * time.Second,
		Loss: []float64{0, 0, .05, .3}[r.IntN(4)], Duplicate: []float64{0, .1}[r.IntN(2)],
		Delay:      []time.Duration{3, 10, 40}[r.IntN(3)] * time.Millisecond,
		Crashes:    r.IntN(4),
		Partitions: r.IntN(3),
		Pauses:     r.IntN(3),
		Failures:   []float64{0, 0, .1}[r.IntN(3)],
	}
	if r.IntN(4) == 0 {
		cfg.Slow = []int{r.IntN(n)}
	}
	if r.IntN(6) == 0 {
		cfg.Late = []int{r.IntN(n)}
	}
	if r.IntN(6) == 0 {
		cfg.PowerCuts = 1
	}
	if n > 1 && r.IntN(4) == 0 {
		for i := range n - 1 {
			if r.IntN(2) == 0 {
				cfg.Dead = append(cfg.Dead, i)
			}
		}
	}
	cfg.CrashWrites = []float64{0, 0, .02}[r.IntN(3)]
	cfg.FullDisks = r.IntN(2)
	if n >= 3 && len(cfg.Dead) == 0 && r.IntN(3) == 0 {
		cfg.Joiners = []int{n - 1}
		if n >= 5 && r.IntN(2) == 0 {
			cfg.Leavers = []int{0}
		}
	}
	cfg.Signed = r.IntN(16) == 0
	return cfg
}

// failing runs a failing plan again, with a trace.
func failing(t *testing.T, cfg Config, err error) {
	t.Helper()
	var trace bytes.Buffer
	cfg.Trace = &trace
	Run(cfg)
	all := filepath.Join(os.TempDir(), fmt.Sprintf("spirt-sim-%d.trace", cfg.Seed))
	if werr := os.WriteFile(all, trace.Bytes(), 0o600); werr != nil {
		all = werr.Error()
	}
	lines := bytes.SplitAfter(trace.Bytes(), []byte("\n"))
	lines = lines[max(0, len(lines)-60):]
	t.Errorf("%v\nreplay: go test ./internal/sim -run %s -seed %d -seeds 1\nplan: %+v\nwhole trace: %s\nits last lines:\n%s", err, t.Name(), cfg.Seed, cfg, all, bytes.Join(lines, nil))
}

func TestChaos(t *testing.T) {
	n := *seeds
	if testing.Short() {
		n /= 6
	}
	var worst time.Duration
	failed := 0
	for i := range n {
		cfg := chaos(*first + uint64(i))
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

func TestSameSeedSameTrace(t *testing.T) {
	for seed := range uint64(5) {
		cfg := chaos(seed + 100)
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

func TestFinishWithFaults(t *testing.T) {
	for seed := range uint64(30) {
		cfg := chaos(seed + 1000)
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
	n := *seeds / 4
	if testing.Short() {
		n /= 6
	}
	var worst time.Duration
	for i := range n {
		seed := *first + uint64(i)
		r := rand.New(rand.NewPCG(seed, 55))
		cfg := Config{Seed: seed, Peers: 4, F: 1, Liars: []int{r.IntN(4)}, Chaos: 3 * time.Second,
			Delay: 10 * time.Millisecond, Loss: []float64{0, .05}[r.IntN(2)]}
		if r.IntN(3) == 0 {
			cfg.Peers, cfg.F, cfg.Liars = 7, 2, []int{r.IntN(3), 3 + r.IntN(4)}
		}
		cfg.Lies = []Lies{AllLies, QuietLies, QuietLies, TwoFaced}[r.IntN(4)]
		cfg.Bridge = r.IntN(2) == 0
		cfg.Partitions = r.IntN(2)
		cfg.Crashes = r.IntN(2)
		cfg.Signed = r.IntN(16) == 0
		res, err := Run(cfg)
		if err != nil {
			failing(t, cfg, err)
			return
		}
		worst = max(worst, res.Met)
	}
	t.Logf("%d seeds, heads met at the latest %v after the last other fault", n, worst)
}

// finality draws a plan in which all f liars sign and vote for everything on
// both sides of one long partition.
func finality(seed uint64) Config {
	r := rand.New(rand.NewPCG(seed, 33))
	n := []int{4, 7, 10}[seed%3]
	f := round.MaxFaulty(n)
	cfg := Config{Seed: seed, Peers: n, F: f, Chaos: 5 * time.Second, Split: true, Bridge: true,
		Lies: []Lies{TwoFaced, TwoFaced, VoteAll | Equivocate, QuietLies | VoteAll | SignAll}[r.IntN(4)], CheckpointEvery: []uint64{1, 2, 4, 8}[r.IntN(4)],
		Crashes: r.IntN(3), CrashWrites: []float64{0, .03}[r.IntN(2)], PowerCuts: r.IntN(2), FullDisks: r.IntN(2),
		Delay: 10 * time.Millisecond, Loss: []float64{0, .1}[r.IntN(2)], Signed: r.IntN(20) == 0}
	cfg.Liars = r.Perm(n)[:f]
	return cfg
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
		cfg := finality(*first + uint64(i))
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
	if int(final) < n/2 {
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
		cfg := Config{Seed: seed, Peers: 4, F: 1, Crashes: 1, Chaos: 2 * time.Second, Rounds: 100}
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
		cfg := Config{Seed: seed, Peers: 4, F: 1, Chaos: 2 * time.Second, Dead: []int{0, 1, 3}}
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
