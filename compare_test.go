package spirt

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/bill"
	"github.com/spirt-ml/spirt/events"
)

// began is when the runs of these tests did.
var began = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func at(seconds float64, e Event) Event {
	e.Time = began.Add(time.Duration(seconds * float64(time.Second)))
	return e
}

func ptr[T any](v T) *T { return &v }

// recorded makes a run folder of a record and events; an empty state is no
// record.
func recorded(t testing.TB, dir string, info RunInfo, all ...Event) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, peersDir, "1"), 0o755); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	for _, e := range all {
		if err := json.NewEncoder(&log).Encode(e); err != nil {
			t.Fatal(err)
		}
	}
	files := map[string][]byte{eventsFile: log.Bytes()}
	if info.State != "" {
		b, err := json.Marshal(info)
		if err != nil {
			t.Fatal(err)
		}
		files[recordFile] = b
	}
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func infoOf(state string, after time.Duration, change func(*Job)) RunInfo {
	job := DefaultJob()
	if change != nil {
		change(&job)
	}
	return RunInfo{State: state, Started: began.Add(after), Job: job}
}

func doneOf(accuracy, loss, seconds float64, cost bill.Money) *Event {
	return &Event{Event: "done", Rounds: 400, Accuracy: &accuracy, Loss: &loss, Seconds: seconds, CostUSD: &cost}
}

// trained are the events of a short run of one peer that was interrupted.
func trained() []Event {
	used := bill.Usage{Invocations: 1, MBMillis: 1024_000, PeerMillis: 3_600_000, BytesOut: 1e9}
	called := Event{Event: "invocation", Peer: 1, Invocation: &events.Invocation{Task: "gradient", BilledMS: 1000, MemoryMB: 1024, Cold: true}}
	failed := called
	failed.Invocation = &events.Invocation{Task: "gradient", BilledMS: 0, MemoryMB: 1024, Error: "Sandbox.Timedout"}
	return []Event{
		at(0, Event{Event: "run", State: "started"}),
		at(1, failed), at(1, called),
		at(2, Event{Event: "round", Peer: 1, Round: 1, Loss: ptr(2.0), Samples: 64, Seconds: 1,
			Steps: []events.Step{{Step: "compute", MS: 750}, {Step: "apply", MS: 250}}, Spent: &events.Spent{Usage: used}}),
		at(3, Event{Event: "validation", Peer: 1, Round: 1, Accuracy: ptr(0.5), Loss: ptr(1.5)}),
		at(4, Event{Event: "warning", Peer: 1, Cause: events.CauseClock}),
		at(4, Event{Event: "warning", Peer: 1, Cause: events.CauseClock}),
		at(5, Event{Event: "round", Peer: 1, Round: 2, Loss: ptr(1.0), Samples: 64, Seconds: 3}),
		at(6, Event{Event: "validation", Peer: 1, Round: 2, Accuracy: ptr(0.75), Loss: ptr(0.7)}),
		at(8, Event{Event: "done", StopReason: "interrupted"}),
	}
}

func TestListRuns(t *testing.T) {
	root := t.TempDir()
	in := func(name string) string { return filepath.Join(root, name) }
	done := infoOf("done", time.Hour, func(j *Job) { j.Seed = 7 })
	done.Done = doneOf(0.97, 0.1, 17.5, 2*bill.USD)
	recorded(t, in("done"), done)
	recorded(t, in("interrupted"), infoOf("interrupted", 2*time.Hour, nil), trained()...)
	recorded(t, in("dead"), infoOf("running", 3*time.Hour, nil), trained()[:4]...)
	recorded(t, in("watched"), infoOf("running", 4*time.Hour, nil), trained()[:4]...)
	recorded(t, in("peers-only"), infoOf("running", 5*time.Hour, nil), trained()[:4]...)
	recorded(t, in("broken"), infoOf("", 0, nil))
	if err := os.WriteFile(filepath.Join(in("broken"), recordFile), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	recorded(t, in("no run"), infoOf("", 0, nil))
	if err := os.Mkdir(filepath.Join(in("no run"), recordFile), 0o755); err != nil {
		t.Fatal(err)
	}
	const pid = "12345\n"
	lock := filepath.Join(peerDir(in("dead"), 1), lockFileName)
	if err := os.WriteFile(lock, []byte(pid), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{in("watched"), peerDir(in("peers-only"), 1)} {
		release, err := LockFolder(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer release()
	}

	runs, left, err := ListRuns(root)
	if err != nil || left != 0 {
		t.Fatal(left, err)
	}
	states := map[string]string{}
	byName := map[string]RunSummary{}
	for _, r := range runs {
		states[r.Name], byName[r.Name] = r.State, r
	}
	if want := map[string]string{"done": "done", "interrupted": "interrupted", "dead": "dead", "watched": "running", "peers-only": "running", "broken": "unreadable"}; !reflect.DeepEqual(states, want) {
		t.Errorf("states %v, want %v", states, want)
	}
	if b, err := os.ReadFile(lock); err != nil || string(b) != pid {
		t.Errorf("the lock says %q, %v after it was looked at", b, err)
	}
	d, i := byName["done"], byName["interrupted"]
	if *d.Accuracy != 0.97 || *d.Loss != 0.1 || d.ScoredOn != "test" || d.Rounds != 400 || d.Seconds != 17.5 || *d.CostUSD != 2*bill.USD || d.Seed != 7 {
		t.Errorf("done: %+v", d)
	}
	want := bill.Default().Cost(bill.Usage{Invocations: 2, MBMillis: 1024_000, PeerMillis: 3_600_000, BytesOut: 1e9}).Total()
	if *i.Accuracy != 0.75 || *i.Loss != 0.7 || i.ScoredOn != "validation" || i.Rounds != 2 || i.Seconds != 8 || *i.CostUSD != want {
		t.Errorf("interrupted: %+v, cost %v, want %v", i, i.CostUSD, want)
	}
	if byName["broken"].Problem == "" {
		t.Error("a broken record is no problem")
	}
	for by, first := range map[string]string{"accuracy": "done", "loss": "done", "started": "peers-only", "cost": "dead", "time": "dead"} {
		if err := SortRuns(runs, by); err != nil || runs[0].Name != first || by == "accuracy" && runs[1].Name != "interrupted" || by == "started" && runs[5].Name != "broken" {
			t.Errorf("by %s: %v first, want %s; %v", by, runs[0].Name, first, err)
		}
	}
	if err := SortRuns(runs, "luck"); err == nil {
		t.Error("sorted by luck")
	}
	if one, _, err := ListRuns(in("done")); err != nil || len(one) != 1 || one[0].Name != "done" {
		t.Errorf("a run folder itself: %v, %v", one, err)
	}
	if _, _, err := ListRuns(in("none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a folder that is not there: %v", err)
	}
}

// A folder of a job on several machines has a genesis and no record.
func TestListJoinedJob(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "home")
	job := DefaultJob()
	job.Seed = 11
	if err := createRun(dir, job); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		last  Event
		state string
	}{
		{Event{Event: "round", Peer: 1, Round: 9}, "interrupted"},
		{Event{Event: "finished", Peer: 1, Round: 9}, "done"},
	} {
		recorded(t, dir, RunInfo{}, at(0, Event{Event: "run"}), at(1, c.last))
		if r := summarize(dir); r.State != c.state || r.Seed != 11 || !r.Started.Equal(began) || r.Problem != "" {
			t.Errorf("after %s: %+v", c.last.Event, r)
		}
	}
}

func TestCompareRuns(t *testing.T) {
	root := t.TempDir()
	a, b := filepath.Join(root, "a"), filepath.Join(root, "b")
	recorded(t, a, infoOf("interrupted", 0, nil), trained()...)
	info := infoOf("done", time.Hour, func(j *Job) { j.Seed, j.Optimizer = 5, "sgd" })
	info.Done = doneOf(0.9, 0.3, 4, bill.USD)
	info.Hardware = &Hardware{CPU: "another", Cores: 8}
	recorded(t, b, info, at(0, Event{Event: "run"}), at(2, Event{Event: "round", Peer: 1, Round: 400, Loss: ptr(0.2), Samples: 100}), at(5, *info.Done))
	prices := *bill.Default()
	prices.Name, prices.Request = "dear", bill.USD
	if err := bill.Write(filepath.Join(a, pricesFile), &prices); err != nil {
		t.Fatal(err)
	}
	c, err := CompareRuns([]string{a, b}, 0.6)
	if err != nil {
		t.Fatal(err)
	}
	var differ []string
	for _, d := range c.Differences {
		differ = append(differ, fmt.Sprint(d.Field, d.Values))
	}
	want := []string{"optimizer[adam sgd]", "seed[1 5]", "cpu[ another]", "cores[ 8]",
		fmt.Sprintf("prices[dear %s aws-arm64 %s]", prices.Date, bill.Default().Date)}
	if !reflect.DeepEqual(differ, want) {
		t.Errorf("they differ in %q, want %q", differ, want)
	}
	x, y := c.Runs[0], c.Runs[1]
	if x.Reached == nil || *x.Reached != (Reached{Round: 2, Seconds: 6}) || y.Reached != nil {
		t.Errorf("reached %+v and %+v", x.Reached, y.Reached)
	}
	if x.Seconds != 8 || x.SamplesPerSecond != 16 || x.Invocations != 2 || x.Failed != 1 || x.Cold != 1 || x.GBSeconds != 1 || x.BytesOut != 1e9 {
		t.Errorf("a: %+v", x)
	}
	if x.Steps[0] != (StepShare{"compute", 750, 0.75}) || x.Steps[4] != (StepShare{"apply", 250, 0.25}) {
		t.Errorf("steps %+v", x.Steps)
	}
	if x.Cost.Requests != 2*bill.USD || *x.TotalUSD != x.Cost.Total() || x.Cost.Peers != prices.PeerHour {
		t.Errorf("cost %+v, total %v", x.Cost, x.TotalUSD)
	}
	if !reflect.DeepEqual(x.Faults, map[string]int{events.CauseClock: 2}) {
		t.Errorf("faults %v", x.Faults)
	}
	if y.Seconds != 4 || y.SamplesPerSecond != 25 || *y.Accuracy != 0.9 || y.ScoredOn != "test" || y.Cost != nil || y.TotalUSD != nil {
		t.Errorf("b: %+v", y)
	}
	if text := ptr(c.Chart()).Text(60, 5); !strings.Contains(text, "1") || !strings.Contains(text, "50 %") {
		t.Errorf("the curves:\n%s", text)
	}
	var table bytes.Buffer
	if err := c.WriteCSV(&table); err != nil {
		t.Fatal(err)
	}
	rows, err := csv.NewReader(&table).ReadAll()
	if err != nil || len(rows) != 3 {
		t.Fatal(rows, err)
	}
	cell := func(row int, name string) string { return rows[row][slices.Index(rows[0], name)] }
	for name, want := range map[string][2]string{"run": {"a", "b"}, "target_seconds": {"6", ""}, "compute_share": {"0.75", ""}, "differs_seed": {"1", "5"},
		"requests_usd": {"2", ""}, "faults": {"clock-jump: 2", ""}, "accuracy": {"0.75", "0.9"}} {
		if got := [2]string{cell(1, name), cell(2, name)}; got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
}

// What an older version told at its end counts where nothing else is told.
func TestCompareOldRun(t *testing.T) {
	root := t.TempDir()
	dirs := []string{filepath.Join(root, "x", "run"), filepath.Join(root, "y", "run")}
	info := infoOf("done", 0, nil)
	info.Done = doneOf(0.9, 0.3, 4, 0)
	info.Done.CostUSD, info.Done.Usage = nil, &Usage{Invocations: 40, GBSeconds: 2.5, Bytes: 300}
	for _, dir := range dirs {
		recorded(t, dir, info)
	}
	c, err := CompareRuns(dirs, 0)
	if err != nil {
		t.Fatal(err)
	}
	r := c.Runs[0]
	if r.Invocations != 40 || r.GBSeconds != 2.5 || r.BytesOut != 300 || r.TotalUSD != nil || len(c.Differences) != 0 {
		t.Errorf("%+v, differences %v", r, c.Differences)
	}
	if r.Name != dirs[0] {
		t.Errorf("two runs of one name: %q", r.Name)
	}
}

func TestCompareWrongUse(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a")
	recorded(t, dir, infoOf("done", 0, nil))
	for name, try := range map[string]struct {
		dirs   []string
		target float64
	}{
		"one": {[]string{dir}, 0}, "twice": {[]string{dir, dir + "/."}, 0}, "none": {[]string{dir, dir + "x"}, 0},
		"target": {[]string{dir, dir + "x"}, 97}, "many": {make([]string, MaxCompared+1), 0},
	} {
		var wrong *UsageError
		if _, err := CompareRuns(try.dirs, try.target); !errors.As(err, &wrong) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Whatever stands in a run folder, it is told as JSON and CSV.
func FuzzCompareRuns(f *testing.F) {
	log := func(all ...Event) []byte {
		var b bytes.Buffer
		for _, e := range all {
			json.NewEncoder(&b).Encode(e)
		}
		return b.Bytes()
	}
	f.Add([]byte(`{"state":"running"}`), log(trained()...))
	f.Add([]byte(`{"state":"done","done":{"accuracy":7,"loss":1e308,"seconds":-1e300,"cost_usd":1}}`), []byte("{}\n"))
	f.Add([]byte(`{"state":"\u001b[2J","started":"9999-12-31T23:59:59Z","job":{"Model":"\u001b"}}`),
		[]byte(`{"time":"0001-01-01T00:00:00Z","event":"round","peer":1,"round":1,"samples":9223372036854775807,"steps":[{"step":"compute","ms":1e308},{"step":"compute","ms":1e308}]}
{"time":"9999-01-01T00:00:00Z","event":"validation","round":1,"loss":1e308,"accuracy":1e308}
{"time":"9999-01-01T00:00:00Z","event":"validation","round":1,"loss":1e308,"accuracy":1e308}
`))
	other := filepath.Join(f.TempDir(), "other")
	recorded(f, other, infoOf("done", 0, nil))
	f.Fuzz(func(t *testing.T, record, log []byte) {
		dir := filepath.Join(t.TempDir(), "run")
		recorded(t, dir, RunInfo{})
		if os.WriteFile(filepath.Join(dir, recordFile), record, 0o644) != nil || os.WriteFile(filepath.Join(dir, eventsFile), log, 0o644) != nil {
			t.Fatal("the run folder cannot be written")
		}
		if _, err := json.Marshal(summarize(dir)); err != nil {
			t.Error(err)
		}
		c, err := CompareRuns([]string{dir, other}, 0.5)
		if err != nil {
			return
		}
		if _, err := json.Marshal(c); err != nil {
			t.Error(err)
		}
		var table bytes.Buffer
		if err := c.WriteCSV(&table); err != nil {
			t.Error(err)
		}
		if bytes.ContainsRune(table.Bytes(), '\x1b') {
			t.Errorf("%q", table.Bytes())
		}
		ptr(c.Chart()).Text(60, 5)
	})
}
