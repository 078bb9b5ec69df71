package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/spirt-ml/spirt"
	"github.com/spirt-ml/spirt/internal/round"
	"github.com/spirt-ml/spirt/internal/sim"
)

// simulation is what the flags of spirt simulate say.
type simulation struct {
	sim.Exploration
	scenario string
	trace    bool
	json     bool
}

func simulateCommand(stdout, stderr io.Writer) *cobra.Command {
	s := simulation{Exploration: sim.Exploration{Peers: 4, Byzantine: 1, First: 1, Seeds: 200}}
	c := &cobra.Command{
		Use:   "simulate",
		Short: "Try the protocol under drawn faults, with many peers in this process",
		Long: "Simulate runs the real round protocol of many peers on a virtual clock, each seed under faults\n" +
			"of its own: crashes at any moment, power cuts, full disks, partitions, pauses, lost messages,\n" +
			"members that come and go, and peers that lie. After every step it checks what must always hold\n" +
			"(docs/protocol.md). A seed that breaks something leaves a scenario file that replays it.",
		Example: "  spirt simulate                                # 200 seeds of 4 peers, of which one lies\n" +
			"  spirt simulate --peers 10 --byzantine 3 --duration 10m\n" +
			"  spirt simulate --scenario spirt-seed-12.scenario --trace | less\n" +
			"  spirt simulate --peers 256 --calm --rounds 5  # traffic and latency of a large roster",
		RunE: func(c *cobra.Command, _ []string) error {
			if err := s.check(c); err != nil {
				return usage(err)
			}
			if s.scenario != "" {
				return s.replay(c.Context(), stdout)
			}
			return s.explore(c.Context(), stdout, stderr)
		},
	}
	f := c.Flags()
	f.IntVar(&s.Peers, "peers", s.Peers, "number of peers, 1 to 1024")
	f.IntVar(&s.Byzantine, "byzantine", s.Byzantine, "how many of them lie, less than a third (default 1, or 0 with --calm or less than 4 peers)")
	f.IntVar(&s.Seeds, "seeds", s.Seeds, "runs, one for each seed")
	f.Uint64Var(&s.First, "seed", s.First, "the first seed")
	f.Uint64Var(&s.Rounds, "rounds", 0, "end each run after so many rounds (default: when all have met after the faults)")
	f.DurationVar(&s.Duration, "duration", 0, "begin no run after this time; without --seeds, run until then")
	f.BoolVar(&s.Calm, "calm", false, "no faults: for traffic and latency; one seed")
	f.StringVar(&s.scenario, "scenario", "", "run the faults in this file")
	f.BoolVar(&s.trace, "trace", false, "with --scenario, write every event and action to standard output")
	f.BoolVar(&s.json, "json", false, "write the summary as one JSON object")
	f.Lookup("byzantine").DefValue = "0"
	return c
}

func (s *simulation) check(c *cobra.Command) error {
	set := c.Flags().Changed
	if err := requirePositive(c, "peers", "seeds", "rounds"); err != nil {
		return err
	}
	if !set("byzantine") && (s.Calm || s.Peers < 4) {
		s.Byzantine = 0
	}
	if s.Calm && !set("seeds") {
		s.Seeds = 1
	}
	if set("duration") && !set("seeds") && !s.Calm {
		s.Seeds = 0
	}
	switch {
	case set("duration") && s.Duration <= 0:
		return fmt.Errorf("--duration %v is not positive", s.Duration)
	case s.Peers < 1 || s.Peers > round.MaxPeers:
		return fmt.Errorf("--peers %d is out of range: take 1 to %d", s.Peers, round.MaxPeers)
	case s.Byzantine < 0 || s.Byzantine > round.MaxFaulty(s.Peers):
		return fmt.Errorf("--byzantine %d: %d peers stand at most %d that lie", s.Byzantine, s.Peers, round.MaxFaulty(s.Peers))
	case s.Calm && s.Byzantine > 0:
		return errors.New("--calm has no faults, so take --byzantine 0")
	case s.Calm && s.Rounds == 0:
		return errors.New("--calm needs --rounds")
	case s.trace && s.scenario == "":
		return errors.New("--trace needs --scenario")
	case s.trace && s.json:
		return errors.New("--trace and --json both write to standard output: take one")
	}
	if s.scenario != "" {
		for _, name := range []string{"peers", "byzantine", "seeds", "seed", "rounds", "duration", "calm"} {
			if set(name) {
				return fmt.Errorf("--scenario says all about the run: leave out --%s", name)
			}
		}
	}
	return nil
}

// replay runs one scenario.
func (s *simulation) replay(ctx context.Context, stdout io.Writer) error {
	f, err := os.Open(s.scenario)
	if err != nil {
		return usage(fmt.Errorf("the scenario cannot be read: %w", err))
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, sim.MaxScenario+1))
	if err != nil {
		return fmt.Errorf("reading the scenario %s: %w", s.scenario, err)
	}
	cfg, err := sim.Parse(text)
	if err != nil {
		return usage(fmt.Errorf("%s: %w", s.scenario, err))
	}
	started := time.Now()
	sum, err := sim.RunOne(ctx, cfg, s.New, s.traceTo(stdout))
	if err != nil {
		return err
	}
	if err := s.print(stdout, &sum, &cfg, time.Since(started)); err != nil {
		return err
	}
	if sum.Err != nil {
		return fmt.Errorf("%w\n  the scenario is %s", sum.Err, s.scenario)
	}
	return nil
}

func (s *simulation) traceTo(stdout io.Writer) io.Writer {
	if s.trace {
		return stdout
	}
	return nil
}

// explore runs the seeds.
func (s *simulation) explore(ctx context.Context, stdout, stderr io.Writer) error {
	started, last := time.Now(), time.Now()
	s.Progress = func(sum *sim.Summary) {
		if time.Since(last) < plainEvery {
			return
		}
		last = time.Now()
		of := ""
		if s.Seeds > 0 {
			of = fmt.Sprintf(" of %d", s.Seeds)
		}
		fmt.Fprintf(stderr, "%d%s seeds, %.0f a second\n", sum.Seeds, of, float64(sum.Seeds)/time.Since(started).Seconds())
	}
	sum := sim.Explore(ctx, s.Exploration)
	if ctx.Err() != nil {
		return spirt.ErrInterrupted
	}
	cfg := s.Config(s.First)
	if err := s.print(stdout, &sum, &cfg, time.Since(started)); err != nil || sum.Err == nil {
		return err
	}
	name := fmt.Sprintf("spirt-seed-%d.scenario", sum.Failed.Seed)
	if err := os.WriteFile(name, sim.Format(*sum.Failed, sum.Err.Error()), 0o644); err != nil {
		return fmt.Errorf("%w\n  the scenario could not be written: %w", sum.Err, err)
	}
	return fmt.Errorf("%w\n  the faults are in %[2]s, and happen again with\n  spirt simulate --scenario %[2]s --trace", sum.Err, name)
}

// print writes the summary.
func (s *simulation) print(stdout io.Writer, sum *sim.Summary, cfg *sim.Config, took time.Duration) error {
	// What one peer sent for one round: as much as it received, lost messages
	// aside.
	share := func(n uint64) float64 { return float64(n) / float64(max(sum.Heights, 1)) / float64(cfg.Peers) }
	if s.json {
		return json.NewEncoder(stdout).Encode(map[string]any{
			"peers": cfg.Peers, "byzantine": s.Byzantine, "seed": s.First, "seeds": sum.Seeds, "violations": sum.Violations,
			"rounds": sum.Heights, "met_seconds": sum.Met.Seconds(), "finals": sum.Finals, "final": sum.Final, "expelled": sum.Expelled,
			"messages": sum.Messages, "bytes": sum.Bytes, "round_seconds": sum.Round.Seconds(),
			"messages_per_peer_and_round": share(sum.Messages), "bytes_per_peer_and_round": share(sum.Bytes),
			"faults": sum.Faults, "seconds": took.Seconds(),
		})
	}
	verdict := "ok"
	if sum.Err != nil {
		verdict = "VIOLATION"
	}
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "  %-9s %s\n", name, fmt.Sprintf(format, args...))
	}
	fmt.Fprintf(&b, "%s: %s of %s, %s in %s\n", verdict, plural(sum.Seeds, "seed"), plural(cfg.Peers, "peer"), plural(int(sum.Heights), "round"), took.Round(time.Millisecond*100))
	if sum.Met > 0 {
		line("met", "all heads, at the latest %.1f s after the last fault", sum.Met.Seconds())
	}
	line("final", "something in %s, up to height %d", plural(sum.Finals, "seed"), sum.Final)
	line("traffic", "%s in %s; %.0f and %s for each peer and round", size(sum.Bytes), plural(int(sum.Messages), "message"), share(sum.Messages), size(uint64(share(sum.Bytes))))
	if cfg.Chaos == 0 {
		line("latency", "%d ms a round", sum.Round.Milliseconds())
	}
	line("faults", "%s", counts(sum.Faults))
	_, err := io.WriteString(stdout, b.String())
	return err
}

// counts lists what struck, over several lines.
func counts(faults map[string]int) string {
	var kinds []string
	for kind := range faults {
		kinds = append(kinds, kind)
	}
	slices.Sort(kinds)
	if len(kinds) == 0 {
		return "none"
	}
	var b strings.Builder
	width := 0
	for i, kind := range kinds {
		text := fmt.Sprintf("%d %s", faults[kind], kind)
		switch {
		case i == 0:
		case width+len(text) > 76:
			b.WriteString(",\n            ")
			width = 0
		default:
			b.WriteString(", ")
		}
		b.WriteString(text)
		width += len(text) + 2
	}
	return b.String()
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// size is a number of bytes for people.
func size(n uint64) string {
	switch {
	case n >= 1e9:
		return fmt.Sprintf("%.1f GB", float64(n)/1e9)
	case n >= 1e6:
		return fmt.Sprintf("%.1f MB", float64(n)/1e6)
	case n >= 1e3:
		return fmt.Sprintf("%.1f kB", float64(n)/1e3)
	}
	return fmt.Sprintf("%d B", n)
}
