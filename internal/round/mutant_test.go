package round_test

import (
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/internal/round"
	"github.com/spirt-ml/spirt/internal/sim"
)

// Each safety rule that is switched off must be noticed by the simulator: if
// not, nothing shows that the rule is there.
func TestMutantsAreKilled(t *testing.T) {
	for _, name := range round.Mutants() {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(200) {
				r := rand.New(rand.NewPCG(seed, 99))
				cfg := sim.Config{
					Seed: seed, Peers: 4, F: 1, Chaos: 4 * time.Second,
					Loss: []float64{0, .1, .4}[r.IntN(3)], Delay: 20 * time.Millisecond,
					Draw: sim.Draw{Crashes: r.IntN(5), Partitions: r.IntN(3), Pauses: r.IntN(3)},
					New:  round.NewMutant(name),
				}
				switch name {
				case "threshold":
					cfg.Liars, cfg.Crashes, cfg.Partitions, cfg.Pauses = []int{0}, 0, 0, 0
				case "believe":
					cfg.Liars, cfg.Lies = []int{0, 1}, sim.Forge
				case "quorum", "vote twice", "forget votes", "blind fork", "vote at once":
					cfg.Liars, cfg.Lies, cfg.Bridge = []int{0}, sim.TwoFaced, true
					cfg.Split, cfg.CheckpointEvery, cfg.Chaos = true, 2, 6*time.Second
					cfg.Loss, cfg.PowerCuts, cfg.CrashWrites = 0, r.IntN(2), .05
				case "keep guilty":
					cfg.Liars, cfg.Lies = []int{1}, sim.Equivocate
				}
				if _, err := sim.Run(cfg); err != nil && !strings.Contains(err.Error(), "P6") {
					t.Logf("killed by %v", err)
					return
				}
			}
			t.Errorf("the mutant lives")
		})
	}
}
