package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/spirt-ml/spirt"
	"github.com/spirt-ml/spirt/bill"
	"github.com/spirt-ml/spirt/dataset"
	"github.com/spirt-ml/spirt/nn"
	"github.com/spirt-ml/spirt/plan"
)

// planning is what the flags of spirt plan say.
type planning struct {
	flags     jobFlags
	job       spirt.Job
	run       string
	rounds    int // to measure
	prices    string
	memory    []int
	parallel  []int
	assumed   plan.Assumptions
	megabits  float64 // of a function
	peer      float64 // likewise, of a peer's machine
	front     bool
	asJSON    bool
	measuring spirt.Job // what was run
	cpus      int
	prefix    string // of the answer: what it was measured on
}

// Bounds of what is measured.
const (
	maxMeasured    = 1000 // rounds
	maxMinibatches = 16   // of a measured round: more tell no more of each
)

func planCommand(stdout, stderr io.Writer) *cobra.Command {
	p := planning{rounds: 8, assumed: plan.DefaultAssumptions()}
	p.megabits, p.peer = 8*p.assumed.Bandwidth/1e6, 8*p.assumed.PeerBandwidth/1e6
	c := &cobra.Command{
		Use:   "plan [JOB.yaml]",
		Short: "What a job would cost and take on AWS Lambda",
		Long: "Plan trains a few rounds of a job here, in a folder that it removes, and reckons from them what\n" +
			"the whole job would cost and take on AWS Lambda, for many sizes of memory and numbers of\n" +
			"functions at once. It prints what it measured and assumed; docs/bill.md has the formulas.",
		Example: "  spirt plan\n" +
			"  spirt plan --batches-per-round 64 --model cnn --front\n" +
			"  spirt plan job.yaml --memory 1769 --parallel 8,16\n" +
			"  spirt plan --run runs/mine --peers 8 --json",
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			table, err := p.check(c, args)
			if err != nil {
				return usage(err)
			}
			measured, err := p.measure(c.Context(), stderr)
			if err != nil {
				return err
			}
			work, err := workOf(p.job)
			if err != nil {
				return usage(err)
			}
			g := plan.Grid{Work: work, Measured: measured, Assumed: p.assumed, Prices: table, Memory: p.memory, Parallel: p.parallel}
			estimates, left, err := g.Estimates()
			if err != nil {
				return usage(err)
			}
			if p.asJSON {
				return json.NewEncoder(stdout).Encode(map[string]any{
					"job": p.job, "work": work, "measured": measured, "assumed": p.assumed, "prices": table, "estimates": p.shown(estimates), "left_out": left,
				})
			}
			_, err = io.WriteString(stdout, p.text(&g, estimates, left))
			return err
		},
	}
	p.flags.add(c)
	f := c.Flags()
	f.StringVar(&p.run, "run", "", "take the measurement from this run instead, and its job")
	f.IntVar(&p.rounds, "measure", p.rounds, "rounds to measure")
	f.StringVar(&p.prices, "prices", bill.DefaultName, "prices: a name of `spirt prices`, or a file")
	f.IntSliceVar(&p.memory, "memory", nil, "sizes of functions in MB (default: the usual ones)")
	f.IntSliceVar(&p.parallel, "parallel", nil, "functions of each peer at once (default: 1, 2, 4, ...)")
	f.Float64Var(&p.assumed.CPUFactor, "cpu-factor", p.assumed.CPUFactor, "speed of a Lambda vCPU, where a core of this machine is 1")
	f.Float64Var(&p.megabits, "bandwidth", p.megabits, "Mbit/s between a function and the database")
	f.Float64Var(&p.peer, "peer-bandwidth", p.peer, "Mbit/s of a peer's machine, for all its functions and to other peers")
	f.Float64Var(&p.assumed.LatencyMS, "latency", p.assumed.LatencyMS, "milliseconds there and back, function to database and peer to peer")
	f.Float64Var(&p.assumed.InvokeMS, "invoke", p.assumed.InvokeMS, "milliseconds that Lambda takes to call a warm function, not billed")
	f.Float64Var(&p.assumed.ColdMS, "cold", p.assumed.ColdMS, "milliseconds until a new instance starts the program, not billed")
	f.Float64Var(&p.assumed.Margin, "margin", p.assumed.Margin, "memory of a function over the most that was measured")
	f.IntVar(&p.assumed.AtOnce, "at-once", p.assumed.AtOnce, "functions that the account may run at once")
	f.BoolVar(&p.assumed.Databases, "databases", false, "each peer's database has a machine of its own")
	f.BoolVar(&p.front, "front", false, "only what no other beats in both time and cost")
	f.BoolVar(&p.asJSON, "json", false, "write one JSON object")
	return c
}

// check finds out what to plan.
func (p *planning) check(c *cobra.Command, args []string) (*bill.Table, error) {
	if p.rounds < 2 || p.rounds > maxMeasured {
		return nil, fmt.Errorf("--measure %d: take 2 to %d rounds, the first of which starts the functions", p.rounds, maxMeasured)
	}
	if len(args) == 1 && p.run != "" {
		return nil, errors.New("a run has its job: leave out the job file, or --run")
	}
	if len(args) == 1 {
		p.flags.file = args[0]
	}
	job, err := p.flags.job(c)
	if p.run != "" && err == nil {
		job, err = p.known(job)
	}
	if err != nil {
		return nil, err
	}
	p.job = job
	if p.job.Functions.Kind != "" {
		return nil, fmt.Errorf("the job computes in the %s, without functions: there is nothing to run on Lambda", p.job.Functions.Kind)
	}
	p.assumed.Bandwidth, p.assumed.PeerBandwidth = p.megabits*1e6/8, p.peer*1e6/8
	if err := p.assumed.Validate(); err != nil {
		return nil, err
	}
	return bill.Open(p.prices)
}

// known returns the job of the run, with as many peers and rounds as the flags
// say; the others cannot change what was measured.
func (p *planning) known(flags spirt.Job) (spirt.Job, error) {
	other := ""
	p.flags.set.VisitAll(func(f *pflag.Flag) {
		if f.Changed && f.Name != "peers" && f.Name != "rounds" {
			other = f.Name
		}
	})
	if other != "" {
		return spirt.Job{}, fmt.Errorf("a run has its job: leave out --%s; --peers and --rounds may differ", other)
	}
	info, err := spirt.ReadRun(p.run)
	if err != nil {
		return spirt.Job{}, err
	}
	job := info.Job
	p.cpus, p.measuring = info.CPUs, info.Job
	if p.flags.set.Changed("peers") {
		job.Peers, job.Byzantine = flags.Peers, 0
	}
	if p.flags.set.Changed("rounds") {
		job.Rounds, job.Cooldown = flags.Rounds, 0
	}
	return job, job.Resolve()
}

// measure returns what a few rounds of the job take here, or what a run took.
func (p *planning) measure(ctx context.Context, stderr io.Writer) (*plan.Measured, error) {
	var m plan.Measurement
	if p.run != "" {
		tail, err := spirt.EventsOf(p.run)
		if err != nil {
			return nil, usage(fmt.Errorf("the events of the run cannot be read: %w", err))
		}
		defer tail.Close()
		if err := tail.Each(m.Add); err != nil {
			return nil, fmt.Errorf("the events of the run cannot be read: %w", err)
		}
		p.prefix = fmt.Sprintf("the run %s", p.run)
		return m.Measured(p.measuring.BatchesPerRound, p.measuring.Functions.Concurrency), nil
	}
	j := p.job
	// One function at once for each peer, and a core or two for each: what is
	// measured shall be the work and not the crowd.
	j.Peers, p.cpus = 1, runtime.NumCPU()
	if p.job.Peers > 1 && p.cpus >= 4 {
		j.Peers = 2
	}
	j.Byzantine, j.Functions.Concurrency = 0, 1
	j.BatchesPerRound = min(j.BatchesPerRound, maxMinibatches)
	j.Rounds, j.Cooldown, j.ValidateEvery = p.rounds, -1, max(1, p.rounds/2)
	j.TargetAccuracy, j.PauseAfter, j.Patience, j.MinDelta, j.MaxTime, j.BudgetUSD = 0, 0, 0, 0, 0, 0
	p.measuring = j
	dir, err := os.MkdirTemp("", "spirt-plan-")
	if err != nil {
		return nil, fmt.Errorf("making a folder for the rounds to measure: %w", err)
	}
	defer os.RemoveAll(dir)
	bar := &progress{w: stderr, job: j, dir: filepath.Join(dir, "run")}
	_, err = spirt.Train(ctx, j, spirt.TrainConfig{Dir: filepath.Join(dir, "run"), OnEvent: func(e spirt.Event, _ []byte) {
		m.Add(&e)
		bar.event(e)
	}})
	bar.close()
	if err != nil {
		return nil, p.flags.explain(err)
	}
	p.prefix = fmt.Sprintf("%s of %s here", plural(j.Rounds, "round"), plural(j.Peers, "peer"))
	return m.Measured(j.BatchesPerRound, j.Functions.Concurrency), nil
}

// workOf returns what a resolved job does.
func workOf(j spirt.Job) (plan.Work, error) {
	spec, err := nn.Builtin(j.Model)
	if err != nil {
		return plan.Work{}, fmt.Errorf("model: %w", err)
	}
	model, err := nn.New(spec)
	if err != nil {
		return plan.Work{}, fmt.Errorf("model: %w", err)
	}
	data, err := dataset.Open(j.Data)
	if err != nil {
		return plan.Work{}, fmt.Errorf("data: %w", err)
	}
	_, validation, _ := data.Split()
	w := plan.Work{
		Peers: j.Peers, Rounds: j.Rounds, Minibatches: j.BatchesPerRound, Validations: (j.Rounds - 1) / j.ValidateEvery, Params: int64(model.NumParams()),
		SampleBytes: int64(data.Stride()) + 1, BatchSize: j.BatchSize, ValidationSamples: validation.Len(), AverageBytes: 4 * int64(model.NumParams()),
	}
	if j.Codec == "float16" {
		w.AverageBytes /= 2
	}
	return w, nil
}

// shown are the estimates to print.
func (p *planning) shown(all []plan.Estimate) []plan.Estimate {
	if !p.front {
		return all
	}
	var out []plan.Estimate
	for _, e := range all {
		if e.Front {
			out = append(out, e)
		}
	}
	return out
}

// text is a plan for people.
func (p *planning) text(g *plan.Grid, estimates []plan.Estimate, left []string) string {
	var b strings.Builder
	w, m, a := &g.Work, g.Measured, &g.Assumed
	fmt.Fprintf(&b, "%s on %s: %s, %s of %d x %d samples for each peer\n\n", clean(p.job.Model), clean(p.job.Data), plural(w.Peers, "peer"), plural(w.Rounds, "round"), w.Minibatches, w.BatchSize)
	fmt.Fprintf(&b, "Measured in %s, %d attempts, %d failed:\n", clean(p.prefix), m.Attempts, m.Failed)
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	times := func(name string, d plan.Times) {
		if d.Count > 0 {
			fmt.Fprintf(t, "  %s\t%.1f ms\t95 %% within %.1f, at most %.1f (%d of them)\n", name, d.Mean, d.P95, d.Max, d.Count)
		}
	}
	times("gradient", m.Gradient)
	times("validation", m.Evaluate)
	times("starting the program", m.Init)
	fmt.Fprintf(t, "  peer, each invocation\t%.1f ms\t\n", m.OverheadMS)
	fmt.Fprintf(t, "  peer, each round\t%.1f ms\tto agree, aggregate and update\n", m.ProtocolMS+m.ApplyMS)
	if m.BytesEach > 0 {
		fmt.Fprintf(t, "  sent to another peer\t%s\tin a round\n", size(uint64(m.BytesEach)))
	} else if w.Peers > 1 {
		fmt.Fprintf(t, "  sent to another peer\t%s\tin a round: an average, not measured\n", size(uint64(w.AverageBytes)))
	}
	if m.PeakMB > 0 {
		fmt.Fprintf(t, "  memory of a function\t%d MB\tat most\n", m.PeakMB)
	} else {
		fmt.Fprintf(t, "  memory of a function\tnot known\ton this system: take a size that is enough\n")
	}
	t.Flush()
	if j := &p.measuring; p.cpus > 0 && j.Peers*j.Functions.Concurrency > p.cpus {
		fmt.Fprintf(&b, "  %d functions at once shared %s, so that these times are long: measure again without --run.\n", j.Peers*j.Functions.Concurrency, plural(p.cpus, "core"))
	}
	if w.Validations > 0 && m.Evaluate.Count == 0 {
		fmt.Fprintf(&b, "  No validation was measured: the %d of each peer are reckoned without their computing.\n", w.Validations)
	}
	fmt.Fprintf(&b, "\nAssumed:\n"+
		"  CPU in proportion to memory, a whole vCPU at %d MB, of which a function uses one; %.2g times a core of the measuring machine\n"+
		"  %.0f Mbit/s for a function, %.0f for a peer's machine, %.3g ms there and back\n"+
		"  %.3g ms to call a function and %.3g ms to make a new instance, neither billed; at most %d functions at once\n"+
		"  memory of at least %.3g times what was measured\n"+
		"  peers%s for as long as the run, prices %s of %s; free tier, logs and storage are not counted\n\n",
		plan.MBPerCPU, a.CPUFactor, 8*a.Bandwidth/1e6, 8*a.PeerBandwidth/1e6, a.LatencyMS, a.InvokeMS, a.ColdMS, a.AtOnce, a.Margin,
		map[bool]string{true: " and databases on machines of their own"}[a.Databases], clean(g.Prices.Name), g.Prices.Date)
	// All amounts with as many decimals, enough for the least of the totals.
	least := estimates[0].TotalUSD.Dollars()
	for _, e := range estimates {
		least = min(least, e.TotalUSD.Dollars())
	}
	decimals := 2
	if least > 0 {
		decimals = max(2, min(12, 3-int(math.Floor(math.Log10(least)))))
	}
	amount := func(m bill.Money) string { return fmt.Sprintf("$%.*f", decimals, m.Dollars()) }
	t = tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(t, "memory\tat once\ttime\tfunctions\trequests\tpeers\t")
	if a.Databases {
		fmt.Fprint(t, "databases\t")
	}
	fmt.Fprintln(t, "transfer\ttotal\t")
	for _, e := range p.shown(estimates) {
		fmt.Fprintf(t, "%d MB\t%d\t%s\t%s\t%s\t%s\t", e.MemoryMB, e.Parallel, lasting(e.Seconds), amount(e.Cost.Functions), amount(e.Cost.Requests), amount(e.Cost.Peers))
		if a.Databases {
			fmt.Fprintf(t, "%s\t", amount(e.Cost.Databases))
		}
		marks := []string{""}
		if e.Front {
			marks = append(marks, "*")
		}
		if e.Cheapest {
			marks = append(marks, "cheapest")
		}
		if e.Fastest {
			marks = append(marks, "fastest")
		}
		fmt.Fprintf(t, "%s\t%s\t%s\n", amount(e.Cost.Transfer), amount(e.TotalUSD), strings.Join(marks, " "))
	}
	t.Flush()
	b.WriteString("\n* no other is both cheaper and faster\n")
	for _, l := range left {
		fmt.Fprintf(&b, "left out: %s\n", l)
	}
	return b.String()
}
