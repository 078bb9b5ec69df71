package spirt

import (
	"cmp"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spirt-ml/spirt/bill"
	"github.com/spirt-ml/spirt/chart"
	"github.com/spirt-ml/spirt/events"
)

// Limits of lists and comparisons.
const (
	maxListed = 4096 // run folders
	// MaxCompared is how many runs CompareRuns takes.
	MaxCompared = 16
	maxCause    = 80 // bytes
)

// RunSummary is a run in a line. What is not known of it is zero or nil.
type RunSummary struct {
	Name     string      `json:"name"` // of its folder
	Dir      string      `json:"dir"`
	State    string      `json:"state"` // running, done, interrupted or failed; dead: it should run, and no process does; unreadable
	Started  time.Time   `json:"started,omitzero"`
	Model    string      `json:"model"`
	Peers    int         `json:"peers"`
	Rounds   uint64      `json:"rounds"`    // that are finished
	Planned  int         `json:"of_rounds"` // as the job says
	Accuracy *float64    `json:"accuracy"`  // a fraction
	Loss     *float64    `json:"loss"`      // likewise on the samples of ScoredOn
	ScoredOn string      `json:"scored_on"` // test, or validation where no model was tested
	Seconds  float64     `json:"seconds"`   // that it went on, without interruptions
	CostUSD  *bill.Money `json:"cost_usd"`  // by the prices of the run
	Seed     uint64      `json:"seed"`
	Problem  string      `json:"problem,omitempty"` // why more could not be read
}

// ListRuns returns the runs whose folders are in dir, or dir where it is one
// itself, by name, and how many entries of dir it did not look at as there are
// too many. A run that cannot be read is in the list and says why.
func ListRuns(dir string) (runs []RunSummary, left int, err error) {
	if isRun(dir) {
		return []RunSummary{summarize(dir)}, 0, nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, 0, err
	}
	runs = []RunSummary{}
	for i, e := range entries {
		if len(runs) >= maxListed {
			return runs, len(entries) - i, nil
		}
		if path := filepath.Join(dir, e.Name()); isRun(path) {
			runs = append(runs, summarize(path))
		}
	}
	return runs, 0, nil
}

// isRun reports whether there is a run's record, or the genesis of a job whose
// peers are on several machines.
func isRun(dir string) bool {
	return isRegular(filepath.Join(dir, recordFile)) || isRegular(filepath.Join(dir, genesisFile))
}

// isRegular tells files from what a reader would wait for, such as a pipe.
func isRegular(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

// SortRuns sorts by accuracy (the highest first), by loss, time or cost (the
// lowest first), or by started (the newest first). Runs of which that is not
// known come last.
func SortRuns(runs []RunSummary, by string) error {
	var key func(r *RunSummary) (float64, bool)
	pointer := func(f *float64, sign float64) (float64, bool) {
		if f == nil {
			return 0, false
		}
		return sign * *f, true
	}
	switch by {
	case "accuracy":
		key = func(r *RunSummary) (float64, bool) { return pointer(r.Accuracy, -1) }
	case "loss":
		key = func(r *RunSummary) (float64, bool) { return pointer(r.Loss, 1) }
	case "time":
		key = func(r *RunSummary) (float64, bool) { return r.Seconds, r.Seconds > 0 }
	case "cost":
		key = func(r *RunSummary) (float64, bool) {
			if r.CostUSD == nil {
				return 0, false
			}
			return float64(*r.CostUSD), true
		}
	case "started":
		key = func(r *RunSummary) (float64, bool) { return -float64(r.Started.UnixMilli()), !r.Started.IsZero() }
	default:
		return fmt.Errorf("runs cannot be sorted by %.40q: take accuracy, loss, time, cost or started", by)
	}
	slices.SortStableFunc(runs, func(a, b RunSummary) int {
		x, known := key(&a)
		y, other := key(&b)
		switch {
		case known && other:
			return cmp.Or(cmp.Compare(x, y), cmp.Compare(a.Name, b.Name))
		case known:
			return -1
		case other:
			return 1
		}
		return cmp.Compare(a.Name, b.Name)
	})
	return nil
}

// summarize reads what there is of a run.
func summarize(dir string) RunSummary {
	s := RunSummary{Name: nameOf(dir), Dir: dir}
	info, err := describeRun(dir)
	if err != nil {
		s.State, s.Problem = "unreadable", err.Error()
		return s
	}
	s.State, s.Started = stateOf(dir, info), info.Started
	s.Model, s.Peers, s.Planned, s.Seed = info.Job.Model, info.Job.Peers, info.Job.Rounds, info.Job.Seed
	if d := info.Done; d != nil && info.State == "done" { // all is there, however long the log is
		s.Rounds, s.Seconds, s.CostUSD = d.Rounds, seconds(d.Seconds), d.CostUSD
		s.Accuracy, s.Loss, s.ScoredOn = score(d, nil)
		return s
	}
	f, err := foldRun(dir, 0)
	if err != nil {
		s.Problem = err.Error()
		return s
	}
	s.Rounds, s.Seconds = f.view.Round, seconds(f.view.Elapsed().Seconds())
	if s.Started.IsZero() {
		s.Started = f.view.Started
	}
	s.Accuracy, s.Loss, s.ScoredOn = score(info.Done, &f.view)
	if prices, err := f.prices(dir); err != nil {
		s.Problem = err.Error()
	} else {
		total := f.bill.Statement(prices).TotalUSD
		s.CostUSD = &total
	}
	if info.State == "" {
		s.State = f.state(s.State)
	}
	return s
}

// describeRun reads run.json. A folder of a job whose peers are on several
// machines has none: its job stands in the genesis, and the state is empty.
func describeRun(dir string) (RunInfo, error) {
	path := filepath.Join(dir, recordFile)
	if isRegular(path) {
		info, err := ReadRun(dir)
		if err == nil && info.State == "" {
			err = fmt.Errorf("%s says no state: it is not that of a run", path)
		}
		return info, err
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return RunInfo{}, fmt.Errorf("%s is not a file that can be read", path)
	}
	if !isRegular(filepath.Join(dir, genesisFile)) {
		return RunInfo{}, fmt.Errorf("%s is no run folder: `spirt runs` lists those there are", dir)
	}
	job, _, err := loadJob(dir)
	return RunInfo{Job: job}, err
}

// stateOf says how a run is. One that should run is dead unless a process holds
// a lock of its folder; where that cannot be told, it is taken to run.
func stateOf(dir string, info RunInfo) string {
	switch {
	case info.State != "running" && info.State != "":
		return info.State
	case inUse(dir):
		return "running"
	case info.State == "":
		return "interrupted"
	}
	return "dead"
}

// inUse reports whether a process starts and watches peers in a run folder, or
// is one of its peers.
func inUse(dir string) bool {
	if isHeld(filepath.Join(dir, lockFileName)) {
		return true
	}
	peers, err := os.Open(filepath.Join(dir, peersDir))
	if err != nil {
		return !errors.Is(err, fs.ErrNotExist)
	}
	defer peers.Close()
	names, _ := peers.Readdirnames(16 * maxPeers) // those before an error
	return slices.ContainsFunc(names, func(name string) bool {
		return isHeld(filepath.Join(dir, peersDir, name, lockFileName))
	})
}

// isHeld reports whether a process has a lock. It asks as holder does, so that
// whoever wants the lock at that moment still gets it.
func isHeld(path string) bool {
	if !isRegular(path) {
		return false
	}
	held, _, err := holder(path)
	return err != nil || held
}

// folded is what the events of a run come to.
type folded struct {
	view     events.View
	bill     events.Bill
	reached  *Reached
	finished bool // a peer has said so, and has not gone on
	skipped  int
}

// Reached is when a run first told a validation of the accuracy that was asked
// for.
type Reached struct {
	Round   uint64  `json:"round"` // that the model is of
	Seconds float64 `json:"seconds"`
}

// foldRun reads the events of a run once. A target of 0 is none.
func foldRun(dir string, target float64) (*folded, error) {
	path := filepath.Join(dir, eventsFile)
	if _, err := os.Stat(path); err == nil && !isRegular(path) {
		return nil, fmt.Errorf("the events of the run cannot be read: %s is no file", path)
	}
	tail, err := EventsOf(dir)
	if err != nil {
		return nil, fmt.Errorf("the events of the run cannot be read: %w", err)
	}
	defer tail.Close()
	var f folded
	err = tail.Each(func(e *Event) {
		f.view.Add(e)
		f.bill.Add(e)
		if e.Event == "finished" || e.Event == "round" {
			f.finished = e.Event == "finished"
		}
		if target > 0 && f.reached == nil && e.Event == "validation" && e.Accuracy != nil && *e.Accuracy >= target {
			f.reached = &Reached{Round: e.Round, Seconds: seconds(f.view.Elapsed().Seconds())}
		}
	})
	if err != nil {
		return nil, fmt.Errorf("the events of the run cannot be read: %w", err)
	}
	f.skipped = tail.Skipped()
	return &f, nil
}

// state is that of a run on several machines, of which the folder tells by the
// peer that is in it.
func (f *folded) state(before string) string {
	if before != "running" && f.finished {
		return "done"
	}
	return before
}

// prices returns the run's own.
func (f *folded) prices(dir string) (*bill.Table, error) {
	path := filepath.Join(dir, pricesFile)
	if _, err := os.Stat(path); err == nil && !isRegular(path) {
		return nil, fmt.Errorf("prices %s: that is no file", path)
	}
	return PricesOf(dir)
}

// score returns accuracy and loss of the tested model or, of a run without,
// those of the last validation.
func score(done *Event, v *events.View) (accuracy, loss *float64, on string) {
	if v != nil && v.Done != nil {
		done = v.Done
	}
	if done != nil && done.Accuracy != nil {
		return fraction(*done.Accuracy), finite(done.Loss), "test"
	}
	if v == nil {
		return nil, nil, ""
	}
	if _, a, ok := v.Accuracy.Last(); ok {
		accuracy, on = fraction(a), "validation"
	}
	if _, l, ok := v.ValidationLoss.Last(); ok {
		loss, on = finite(&l), "validation"
	}
	return accuracy, loss, on
}

// fraction returns nil for what is no accuracy.
func fraction(f float64) *float64 {
	if !(f >= 0 && f <= 1) {
		return nil
	}
	return &f
}

// finite returns nil for what JSON has no number for.
func finite(f *float64) *float64 {
	if f == nil || math.IsInf(*f, 0) || math.IsNaN(*f) {
		return nil
	}
	return f
}

// seconds cuts a time to one that a Duration can be.
func seconds(s float64) float64 {
	return min(max(s, 0), math.MaxInt64/1e9)
}

func nameOf(dir string) string {
	if abs, err := filepath.Abs(dir); err == nil {
		dir = abs
	}
	return filepath.Base(dir)
}

// Comparison is what CompareRuns returns: runs in the order they were named.
type Comparison struct {
	Target      float64         `json:"target_accuracy,omitempty"`
	Differences []RunDifference `json:"differences"`
	Runs        []RunResult     `json:"runs"`
	views       []*events.View  // of Runs
}

// RunDifference is a field of the job, or something else that a run's results
// follow from, that is not the same in all runs.
type RunDifference struct {
	Field  string   `json:"field"`
	Values []string `json:"values"` // of each run
}

// RunResult is what came of a run. What is not known is zero or nil.
type RunResult struct {
	Name             string         `json:"name"` // of its folder, or the whole path where two have one name
	Dir              string         `json:"dir"`
	State            string         `json:"state"` // as in RunSummary
	Started          time.Time      `json:"started,omitzero"`
	Job              Job            `json:"job"`
	Accuracy         *float64       `json:"accuracy"`
	Loss             *float64       `json:"loss"`
	ScoredOn         string         `json:"scored_on"`
	Rounds           uint64         `json:"rounds"`
	Seconds          float64        `json:"seconds"`
	Reached          *Reached       `json:"target"` // nil if it was not
	SamplesPerSecond float64        `json:"samples_per_second"`
	Steps            []StepShare    `json:"steps"`
	Invocations      int64          `json:"invocations"`
	Failed           int64          `json:"failed_invocations"`
	Cold             int64          `json:"cold_starts"`
	GBSeconds        float64        `json:"gb_seconds"`
	BytesOut         int64          `json:"bytes_out"` // between the peers
	Cost             *bill.Cost     `json:"cost"`      // nil of a run that does not tell what it used
	TotalUSD         *bill.Money    `json:"total_usd"`
	Prices           string         `json:"prices"` // the name of the table
	PricesDate       string         `json:"prices_date"`
	Faults           map[string]int `json:"faults"`           // by cause
	Skipped          int            `json:"unreadable_lines"` // of the events
}

// StepShare is a step of the rounds of a run, over all peers.
type StepShare struct {
	Step  string  `json:"step"`
	MS    float64 `json:"ms"`
	Share float64 `json:"share"` // of the time of all steps
}

// CompareRuns reads two or more runs, at most MaxCompared, and says in what
// their jobs differ and what came of each. It looks for when a validation first
// had the target accuracy, a fraction; 0 is none.
func CompareRuns(dirs []string, target float64) (*Comparison, error) {
	switch {
	case len(dirs) < 2 || len(dirs) > MaxCompared:
		return nil, &UsageError{fmt.Errorf("%d run folders cannot be compared: name 2 to %d", len(dirs), MaxCompared)}
	case !(target >= 0 && target <= 1):
		return nil, &UsageError{fmt.Errorf("the target accuracy %v is no fraction: take 0 to 1 (0.97 for 97 %%)", target)}
	}
	c := &Comparison{Target: target, Differences: []RunDifference{}}
	var told [][]RunDifference // of each run, with one value
	for i, dir := range dirs {
		if slices.ContainsFunc(dirs[:i], func(other string) bool { return filepath.Clean(other) == filepath.Clean(dir) }) {
			return nil, &UsageError{fmt.Errorf("%s is named twice: a run does not differ from itself", dir)}
		}
		info, err := describeRun(dir)
		if err != nil {
			return nil, &UsageError{err}
		}
		f, err := foldRun(dir, target)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", dir, err)
		}
		prices, err := f.prices(dir)
		if err != nil {
			return nil, err
		}
		r := f.result(dir, info, prices)
		c.Runs, c.views = append(c.Runs, r), append(c.views, &f.view)
		told = append(told, facts(info, r))
	}
	for i := range told[0] {
		d := RunDifference{Field: told[0][i].Field}
		for _, t := range told {
			d.Values = append(d.Values, t[i].Values[0])
		}
		if len(slices.Compact(slices.Clone(d.Values))) > 1 {
			c.Differences = append(c.Differences, d)
		}
	}
	names := map[string]int{}
	for _, r := range c.Runs {
		names[r.Name]++
	}
	for i := range c.Runs {
		if names[c.Runs[i].Name] > 1 {
			c.Runs[i].Name = dirs[i]
		}
	}
	return c, nil
}

// result is what came of a run, at its own prices.
func (f *folded) result(dir string, info RunInfo, prices *bill.Table) RunResult {
	v := &f.view
	s := f.bill.Statement(prices)
	r := RunResult{
		Name: nameOf(dir), Dir: dir, State: stateOf(dir, info), Started: info.Started, Job: info.Job,
		Rounds: v.Round, Seconds: seconds(v.Elapsed().Seconds()), Reached: f.reached, Steps: []StepShare{}, Invocations: v.Functions.Invocations, Failed: v.Functions.Failed, Cold: v.Functions.Cold,
		GBSeconds: s.Usage.GBSeconds(), BytesOut: s.Usage.BytesOut, Prices: prices.Name, PricesDate: prices.Date,
		Faults: map[string]int{}, Skipped: f.skipped,
	}
	if info.State == "" {
		r.State = f.state(r.State)
	}
	if r.Started.IsZero() {
		r.Started = v.Started
	}
	if d := info.Done; d != nil && info.State == "done" {
		r.Rounds, r.Seconds = d.Rounds, seconds(d.Seconds) // as in RunSummary: without the test
	}
	if r.Seconds > 0 {
		r.SamplesPerSecond = min(float64(max(v.Samples, 0))/r.Seconds, math.MaxInt64)
	}
	r.Accuracy, r.Loss, r.ScoredOn = score(info.Done, v)
	all := 0.0
	for _, ms := range v.Steps {
		all += ms
	}
	if all > 0 && !math.IsInf(all, 0) {
		for i, ms := range v.Steps {
			r.Steps = append(r.Steps, StepShare{events.Steps[i], ms, ms / all})
		}
	}
	if d := info.Done; s.Usage != (bill.Usage{}) {
		r.Cost, r.TotalUSD = &s.Cost, &s.TotalUSD
	} else if d != nil && d.Usage != nil { // by a version that told it at the end only
		r.Invocations, r.GBSeconds, r.BytesOut, r.TotalUSD = int64(d.Invocations), d.GBSeconds, d.Bytes, d.CostUSD
	}
	for cause, n := range v.Causes {
		cause = strings.ToValidUTF8(cause[:min(len(cause), maxCause)], "")
		r.Faults[cmp.Or(cause, "other")] += n
	}
	return r
}

// facts are the fields of a job by their names in a job file, and what else
// results follow from, in an order that is the same for all runs.
func facts(info RunInfo, r RunResult) []RunDifference {
	job := info.Job
	orString(&job.Functions.Kind, functionsProcesses) // the default has no name in a record
	out := jobFacts(nil, "", reflect.ValueOf(job))
	cpu, cores := "", ""
	if h := info.Hardware; h != nil {
		cpu, cores = h.CPU, strconv.Itoa(h.Cores)
	}
	add := func(field, value string) { out = append(out, RunDifference{field, []string{value}}) }
	add("data hash", info.DataHash)
	add("version", info.Version)
	add("platform", info.Platform)
	add("cpu", cpu)
	add("cores", cores)
	add("prices", strings.TrimSpace(r.Prices+" "+r.PricesDate))
	return out
}

func jobFacts(out []RunDifference, prefix string, job reflect.Value) []RunDifference {
	for i := range job.NumField() {
		name, _, _ := strings.Cut(job.Type().Field(i).Tag.Get("yaml"), ",")
		if f := job.Field(i); f.Kind() == reflect.Struct {
			out = jobFacts(out, prefix+name+".", f)
		} else {
			out = append(out, RunDifference{prefix + name, []string{fmt.Sprint(f.Interface())}})
		}
	}
	return out
}

// Chart returns the learning curves of the runs over each other.
func (c *Comparison) Chart() chart.Chart {
	runs := make([]chart.Run, len(c.Runs))
	names := make([]string, len(c.Runs))
	for i, r := range c.Runs {
		runs[i], names[i] = chart.Run{Name: r.Name, View: c.views[i]}, r.Name
	}
	fields := make([]string, len(c.Differences))
	for i, d := range c.Differences {
		fields[i] = d.Field
	}
	subtitle := "one job"
	if len(fields) > 0 {
		subtitle = "they differ in " + strings.Join(fields, ", ")
	}
	return chart.Compare(strings.Join(names, ", "), subtitle, runs)
}

// WriteCSV writes a line for each run, at the end with what differs.
func (c *Comparison) WriteCSV(w io.Writer) error {
	out := csv.NewWriter(w)
	head := []string{"run", "state", "started", "accuracy", "loss", "scored_on", "rounds", "seconds", "target_round", "target_seconds", "samples_per_second"}
	for _, s := range events.Steps {
		head = append(head, s+"_share")
	}
	head = append(head, "invocations", "failed_invocations", "cold_starts", "gb_seconds", "bytes_out",
		"functions_usd", "requests_usd", "peers_usd", "databases_usd", "transfer_usd", "total_usd", "prices", "faults")
	for _, d := range c.Differences {
		head = append(head, "differs_"+strings.ReplaceAll(d.Field, " ", "_"))
	}
	if err := out.Write(head); err != nil {
		return err
	}
	number := func(f float64) string { return strconv.FormatFloat(f, 'g', -1, 64) }
	for i, r := range c.Runs {
		known := func(f *float64) string {
			if f == nil {
				return ""
			}
			return number(*f)
		}
		started := ""
		if !r.Started.IsZero() {
			started = r.Started.UTC().Format(time.RFC3339)
		}
		row := []string{r.Name, r.State, started, known(r.Accuracy), known(r.Loss), r.ScoredOn, strconv.FormatUint(r.Rounds, 10), number(r.Seconds)}
		if t := r.Reached; t != nil {
			row = append(row, strconv.FormatUint(t.Round, 10), number(t.Seconds))
		} else {
			row = append(row, "", "")
		}
		row = append(row, number(r.SamplesPerSecond))
		for j := range events.Steps {
			if len(r.Steps) > 0 {
				row = append(row, number(r.Steps[j].Share))
			} else {
				row = append(row, "")
			}
		}
		for _, n := range []int64{r.Invocations, r.Failed, r.Cold} {
			row = append(row, strconv.FormatInt(n, 10))
		}
		row = append(row, number(r.GBSeconds), strconv.FormatInt(r.BytesOut, 10))
		if k := r.Cost; k != nil {
			for _, m := range []bill.Money{k.Functions, k.Requests, k.Peers, k.Databases, k.Transfer} {
				row = append(row, m.Decimal())
			}
		} else {
			row = append(row, "", "", "", "", "")
		}
		total := ""
		if r.TotalUSD != nil {
			total = r.TotalUSD.Decimal()
		}
		var faults []string
		for _, cause := range slices.Sorted(maps.Keys(r.Faults)) {
			faults = append(faults, fmt.Sprintf("%s: %d", cause, r.Faults[cause]))
		}
		row = append(row, total, r.Prices, strings.Join(faults, "; "))
		for _, d := range c.Differences {
			row = append(row, d.Values[i])
		}
		for j := range row {
			row[j] = printable(row[j])
		}
		if err := out.Write(row); err != nil {
			return err
		}
	}
	out.Flush()
	return out.Error()
}
