package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"

	"github.com/spirt-ml/spirt"
)

// progress shows a run to a person: a bar on a terminal, plain lines
// elsewhere. Its methods are called from one goroutine.
type progress struct {
	w        io.Writer
	job      spirt.Job
	dir      string
	started  time.Time
	lastLine time.Time
	round    uint64
	bar      *mpb.Bar // nil where there is no terminal
	bars     *mpb.Progress

	mu       sync.Mutex // the bar draws from its own goroutine
	loss     float64
	accuracy float64
	members  int
}

// plainEvery is the time between two plain lines without other news.
const plainEvery = 2 * time.Second

func newProgress(w io.Writer, job spirt.Job, dir string) *progress {
	return &progress{w: w, job: job, dir: dir, accuracy: -1}
}

// start says what is trained, once the peers are started.
func (p *progress) start() {
	w, job := p.w, p.job
	p.started = time.Now()
	p.lastLine = p.started
	fmt.Fprintf(w, "training %s on %s: %d peers, %d rounds of %d x %d samples each, run folder %s\n",
		job.Model, job.Data, job.Peers, job.Rounds, job.BatchesPerRound, job.BatchSize, p.dir)
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		p.bars = mpb.New(mpb.WithOutput(w), mpb.WithWidth(40), mpb.WithRefreshRate(150*time.Millisecond))
		p.bar = p.bars.AddBar(int64(job.Rounds),
			mpb.PrependDecorators(decor.CountersNoUnit("round %d/%d")),
			mpb.AppendDecorators(decor.Any(func(s decor.Statistics) string { return p.text(s.Current) })),
		)
	}
}

// text is the part of the bar after the bar itself.
func (p *progress) text(round int64) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := fmt.Sprintf("loss %.4f", p.loss)
	if p.accuracy >= 0 {
		s += fmt.Sprintf("  accuracy %.1f %%", 100*p.accuracy)
	}
	s += fmt.Sprintf("  peers %d/%d", p.members, p.job.Peers)
	if spent := time.Since(p.started); round > 0 {
		left := time.Duration(float64(spent) / float64(round) * float64(int64(p.job.Rounds)-round))
		s += fmt.Sprintf("  %.0f rounds/s  %v left", float64(round)/spent.Seconds(), left.Round(time.Second))
	}
	return s
}

func (p *progress) event(e spirt.Event) {
	if p.started.IsZero() {
		p.start()
	}
	switch e.Event {
	case "round":
		if e.Round <= p.round {
			return // another peer told it
		}
		p.round = e.Round
		p.mu.Lock()
		if e.Loss != nil {
			p.loss = *e.Loss
		}
		p.members = len(e.Members)
		p.mu.Unlock()
		if p.bar != nil {
			p.bar.SetCurrent(int64(e.Round))
		} else if now := time.Now(); now.Sub(p.lastLine) >= plainEvery {
			p.lastLine = now
			fmt.Fprintf(p.w, "round %d/%d  %s\n", e.Round, p.job.Rounds, p.text(int64(e.Round)))
		}
	case "validation":
		if e.Accuracy != nil {
			p.mu.Lock()
			p.accuracy = *e.Accuracy
			p.mu.Unlock()
		}
	case "peer":
		if e.State == "started" || e.State == "finished" || (e.By != 0 && e.State == "connected") {
			return
		}
		text := fmt.Sprintf("peer %d %s", e.Peer, e.State)
		if e.By != 0 { // the whole reason stands in the events
			reason, _, _ := strings.Cut(e.Message, ":")
			text = fmt.Sprintf("peer %d: %s (%s)", e.By, text, reason)
		} else if e.Message != "" {
			text += ": " + e.Message
		}
		p.say("%s", text)
	case "warning":
		p.say("peer %d: %s", e.Peer, e.Message)
	}
}

// say prints a line above the bar.
func (p *progress) say(format string, args ...any) {
	// What a peer or a function said may hold anything; a terminal obeys some.
	line := strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, fmt.Sprintf(format, args...)) + "\n"
	if p.bars != nil {
		p.bars.Write([]byte(line)) // the bar's own writer keeps lines and bar apart
		return
	}
	io.WriteString(p.w, line)
}

// close ends the bar, whatever it shows.
func (p *progress) close() {
	if p.bar == nil {
		return
	}
	if !p.bar.Completed() {
		p.bar.Abort(false)
	}
	p.bars.Wait()
}

func (p *progress) summary(e spirt.Event) {
	fmt.Fprintf(p.w, "done: accuracy %.2f %% on the test samples after %d rounds in %.1f s\n", 100**e.Accuracy, e.Rounds, e.Seconds)
	finished := 0
	for _, d := range e.Peers {
		if d.State == "finished" {
			finished++
		}
	}
	same := "the same model on every one"
	if e.Timeouts > 0 {
		same = fmt.Sprintf("%s; %d timeouts fired, so that another run with this seed may differ", same, e.Timeouts)
	}
	fmt.Fprintf(p.w, "%d of %d peers finished, %s (%.12s)\n", finished, len(e.Peers), same, e.Model)
	fmt.Fprintf(p.w, "%d invocations, %.1f GB-s of functions, %.1f MB between peers\n", e.Invocations, e.GBSeconds, float64(e.Bytes)/1e6)
	fmt.Fprintf(p.w, "model in %s/model.safetensors; try: spirt eval --run %s\n", e.Run, e.Run)
}
