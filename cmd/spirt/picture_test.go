package main

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spirt-ml/spirt"
	"github.com/spirt-ml/spirt/bill"
	"github.com/spirt-ml/spirt/events"
)

// viewOf folds a run of so many peers that is after so many rounds.
func viewOf(peers, rounds int, more ...events.Event) *events.View {
	at := time.Date(2026, 3, 4, 10, 0, 0, 0, time.UTC)
	v := new(events.View)
	add := func(e events.Event) {
		e.Time = at
		v.Add(&e)
	}
	add(events.Event{Event: "run", State: "started"})
	for n := range peers {
		add(events.Event{Event: "peer", Peer: n + 1, State: "started", PID: 100 + n})
	}
	for r := 1; r <= rounds; r++ {
		for n := 1; n <= peers; n++ {
			at = at.Add(250 * time.Millisecond / time.Duration(peers))
			if n == 3 && r > rounds-5 { // a straggler
				continue
			}
			call := &events.Invocation{Task: "gradient", Round: uint64(r), Cold: r == 1, BilledMS: 20, MemoryMB: 256, MS: 18}
			if n == 2 && r%40 == 7 {
				call.Error = "Runtime.ExitError"
			}
			add(events.Event{Event: "invocation", Peer: n, Invocation: call})
			loss := 2.3*math.Exp(-float64(r)/40) + 0.02*float64(n%4) + 0.05*math.Sin(float64(r*n))*math.Exp(-float64(r)/100)
			e := events.Event{Event: "round", Peer: n, Round: uint64(r), Loss: &loss, Seconds: 0.25, Samples: 64, Instances: 2, How: "recomputed",
				Steps: []events.Step{{Step: "compute", MS: 130}, {Step: "gather", MS: 60}, {Step: "ballot", MS: 9}, {Step: "fetch", MS: 31}, {Step: "apply", MS: 12}, {Step: "record", MS: 8}},
				Spent: &events.Spent{Usage: bill.Usage{PeerMillis: 250, BytesOut: 250_000 * int64(peers-1)}, CostUSD: 4_000_000}}
			for other := 1; other <= peers; other++ {
				if other != n {
					e.Traffic = append(e.Traffic, events.Traffic{Peer: other, In: 250_000, Out: 251_000})
				}
			}
			add(e)
		}
		if r%25 == 0 {
			accuracy, loss := 1-0.9*math.Exp(-float64(r)/30), 0.1+2.2*math.Exp(-float64(r)/45)
			add(events.Event{Event: "validation", Peer: 1, Round: uint64(r), Accuracy: &accuracy, Loss: &loss})
		}
	}
	for _, e := range more {
		add(e)
	}
	return v
}

func testJob(peers, rounds int) spirt.Job {
	job := spirt.DefaultJob()
	job.Peers, job.Rounds, job.Data = peers, rounds, "mnist-10k"
	return job
}

// after returns a time after the last event of a view.
func after(v *events.View, d time.Duration) time.Time { return v.Latest.Add(d) }

func TestPicture(t *testing.T) {
	accuracy := 0.972
	price := bill.USD / 1000
	faults := []events.Event{
		{Event: "warning", Peer: 1, About: 2, Cause: events.CauseRefused, Message: "the average of peer 2 is not finite"},
		{Event: "peer", Peer: 3, By: 1, State: "lost", Message: "connection closed: EOF"},
		{Event: "warning", Peer: 4, Cause: events.CauseFunction, Message: "a function said \x1b[2J\x1b]0;owned\x07 and\r\n\u202etxt.exe 日本語の長いメッセージです, and went on to say a lot more than what fits into a line of a terminal, whatever its width"},
		{Event: "waiting", Peer: 1, Step: "gather", Members: []int{3}, Seconds: 2},
		{Event: "waiting", Peer: 2, Step: "ballot", Members: []int{3, 4}, Seconds: 2},
	}
	for _, c := range []struct {
		name  string
		view  *events.View
		frame frame
		after time.Duration
	}{
		{"nothing", new(events.View), frame{job: testJob(4, 400), width: 80, height: 24}, 0},
		{"starting", viewOf(4, 0), frame{job: testJob(4, 400), width: 80, height: 24}, time.Second},
		{"narrow", viewOf(4, 150, faults...), frame{job: testJob(4, 400), width: 60, height: 24, note: "stopping: the peers write their checkpoints"}, 0},
		{"usual", viewOf(4, 150, faults...), frame{job: testJob(4, 400), width: 100, height: 40}, time.Second},
		{"low", viewOf(4, 150, faults...), frame{job: testJob(4, 400), width: 100, height: 12}, 15 * time.Second},
		{"many", viewOf(64, 30, faults...), frame{job: testJob(64, 400), width: 120, height: 30}, 0},
		{"done", viewOf(4, 400, events.Event{Event: "done", StopReason: "rounds", Accuracy: &accuracy, Seconds: 100, CostUSD: &price}),
			frame{job: testJob(4, 400), width: 100, height: 30}, time.Hour},
		{"failed", viewOf(2, 40, events.Event{Event: "peer", Peer: 1, State: "crashed", Message: "signal: killed"},
			events.Event{Event: "peer", Peer: 2, State: "failed", Message: "exit status 1"},
			events.Event{Event: "done", StopReason: "failed"}), frame{job: testJob(2, 400), width: 80, height: 24}, 0},
		{"colour", viewOf(4, 150, faults...), frame{job: testJob(4, 400), width: 80, height: 24, colour: true}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.frame.dir = "runs/20260304-100000-lenet5"
			now := time.Date(2026, 3, 4, 10, 0, 0, 0, time.UTC)
			if !c.view.Latest.IsZero() {
				now = after(c.view, c.after)
			}
			got := c.frame.render(c.view, now)
			fits(t, &c.frame, got)
			path := filepath.Join("testdata", "picture", c.name+".txt")
			if os.Getenv("UPDATE_SCRIPTS") != "" {
				if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("the picture differs from %s; look at it, and set UPDATE_SCRIPTS=1 if it is right:\n%s", path, got)
			}
		})
	}
}

// fits fails if a picture is wider or higher than its frame, or holds what a
// terminal would obey.
func fits(t *testing.T, f *frame, picture string) {
	t.Helper()
	lines := strings.Split(strings.TrimSuffix(picture, "\n"), "\n")
	if len(lines) > max(f.height-1, 3) {
		t.Errorf("%d lines on a terminal of %d", len(lines), f.height)
	}
	for _, line := range lines {
		text := withoutStyle(line)
		if n := columns(text); n > f.width {
			t.Errorf("%d columns of %d: %q", n, f.width, line)
		}
		if text != clean(text) || !f.colour && text != line {
			t.Errorf("a line has control characters: %q", line)
		}
	}
}

// Whatever the size of the terminal, a picture fits.
func TestPictureFits(t *testing.T) {
	views := []*events.View{new(events.View), viewOf(1, 1), viewOf(4, 60, events.Event{Event: "warning", Peer: 1, Message: strings.Repeat("漢字", 500)}), viewOf(64, 4)}
	for _, v := range views {
		for width := 1; width <= 210; width += 3 {
			for _, height := range []int{1, 2, 5, 8, 10, 11, 13, 16, 19, 24, 25, 31, 50, 80, 200} {
				f := frame{job: testJob(len(v.Peers), 1000), dir: strings.Repeat("/長い", 40), width: width, height: height, colour: width%2 == 0}
				fits(t, &f, f.render(v, after(v, 0)))
			}
		}
	}
}

// Where there are more peers than lines, those in trouble are shown.
func TestPictureShowsTrouble(t *testing.T) {
	v := viewOf(64, 10, events.Event{Event: "peer", Peer: 61, State: "crashed", Message: "signal: killed"})
	f := frame{job: testJob(64, 400), width: 80, height: 20}
	got := f.render(v, after(v, 0))
	for _, want := range []string{"61 crashed", "more peers: ", "peer 61 crashed (signal: killed)"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
}

// A hostile event log makes no picture that a terminal would obey.
func FuzzPicture(f *testing.F) {
	f.Add("started", "\x1b[2J", "gather", 0.5, uint64(7), 80, 24)
	f.Add("\x9b31m", "a\u0301\u200d\U0001F468", "\n", math.Inf(1), uint64(math.MaxUint64), 3, 200)
	f.Fuzz(func(t *testing.T, state, message, step string, value float64, round uint64, width, height int) {
		width, height = 1+(width&0xff), 1+(height&0xff)
		more := []events.Event{
			{Event: "peer", Peer: 2, State: state, Message: message},
			{Event: "round", Peer: 1, Round: round, Loss: &value, Seconds: value, Steps: []events.Step{{Step: "compute", MS: value}}, Traffic: []events.Traffic{{Peer: 2, In: int64(round), Out: -5}}},
			{Event: "validation", Round: round, Accuracy: &value, Loss: &value},
			{Event: "warning", Peer: 1, Cause: state, Message: message},
			{Event: "waiting", Peer: 1, Step: step, Members: []int{1, -1}},
			{Event: "done", StopReason: state, Seconds: value},
		}
		for i := range more {
			v := viewOf(2, 3, more[:i+1]...)
			fr := frame{job: testJob(2, 400), dir: message, width: width, height: height, colour: height%2 == 0, note: message}
			fits(t, &fr, fr.render(v, after(v, time.Duration(round))))
		}
	})
}

// Each picture is drawn over the one before, also when the terminal became
// narrower and wrapped it.
func TestScreen(t *testing.T) {
	var b strings.Builder
	s := screen{w: &b}
	draw := func(picture string, width int) string {
		b.Reset()
		if err := s.draw(picture, width); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	if got := draw("one\n\x1b[1mtwo\x1b[0m two\n", 20); strings.Contains(got, "A") || !strings.Contains(got, "one\x1b[K\r\n") {
		t.Errorf("the first: %q", got)
	}
	for _, c := range []struct{ width, up int }{{20, 2}, {20, 2}, {5, 3}, {3, 4}} { // "two two" takes 1, 1, 2 and 3 lines
		got := draw("one\n\x1b[1mtwo\x1b[0m two\n", c.width)
		if want := fmt.Sprintf("\r\x1b[%dA", c.up); !strings.Contains(got, want) {
			t.Errorf("at %d columns: %q, want %q", c.width, got, want)
		}
	}
	s.forget()
	if got := draw("one\n", 20); strings.Contains(got, "A") {
		t.Errorf("after forget: %q", got)
	}
}
