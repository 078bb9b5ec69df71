package main

import (
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/spirt-ml/spirt"
	"github.com/spirt-ml/spirt/events"
)

// progress shows a run to a person: a picture on a terminal, plain lines
// elsewhere. Its methods are called from one goroutine, but for stopping.
type progress struct {
	w        io.Writer
	job      spirt.Job
	dir      string
	quiet    bool // only the summary
	plain    bool // no picture
	started  bool
	lastLine time.Time
	view     events.View

	mu   sync.Mutex
	live *live // nil where there is no terminal
}

// plainEvery is the time between two plain lines without other news.
const plainEvery = 2 * time.Second

// start says what is trained, once the peers are started.
func (p *progress) start() {
	p.started, p.lastLine = true, time.Now()
	if p.quiet {
		return
	}
	if !p.plain {
		p.mu.Lock()
		p.live = newLive(p.w, &p.view, frame{job: p.job, dir: p.dir})
		p.mu.Unlock()
	}
	if p.live == nil {
		job := p.job
		fmt.Fprintf(p.w, "training %s on %s: %d peers, %d rounds of %d x %d samples each, run folder %s\n",
			job.Model, job.Data, job.Peers, job.Rounds, job.BatchesPerRound, job.BatchSize, p.dir)
	}
}

// stopping says that the peers were asked to stop.
func (p *progress) stopping() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.live != nil {
		p.live.loud()
		p.live.say("stopping: the peers write their checkpoints; Ctrl-C again ends this at once")
	}
}

// text is a plain line on the run as it is.
func (p *progress) text() string {
	v := &p.view
	s := fmt.Sprintf("round %d/%d", v.Round, p.job.Rounds)
	if _, loss, ok := v.Loss.Last(); ok {
		s += fmt.Sprintf("  loss %.4f", loss)
	}
	if _, accuracy, ok := v.Accuracy.Last(); ok {
		s += fmt.Sprintf("  accuracy %.1f %%", 100*accuracy)
	}
	if n := v.SamplesPerSecond(); n > 0 {
		s += fmt.Sprintf("  %.0f images/s", n)
	}
	if v.Spent > 0 {
		s += "  cost " + v.Spent.String()
	}
	if left := v.Left(uint64(p.job.Rounds)); left > 0 {
		s += "  " + duration(left) + " left"
	}
	return s
}

func (p *progress) event(e spirt.Event) {
	if !p.started {
		p.start()
	}
	before := p.view.Round
	if p.live != nil {
		p.live.update(func() { p.view.Add(&e) })
		return
	}
	p.view.Add(&e)
	if p.quiet {
		return
	}
	switch e.Event {
	case "round":
		if now := time.Now(); p.view.Round > before && now.Sub(p.lastLine) >= plainEvery {
			p.lastLine = now
			fmt.Fprintln(p.w, p.text())
		}
	case "peer":
		if e.State == "started" || e.State == "finished" || e.State == "connected" && e.By != 0 {
			return
		}
		p.say("%s", eventText(&e))
	case "warning":
		p.say("%s", eventText(&e))
	}
}

// say prints a line, or shows it with the picture.
func (p *progress) say(format string, args ...any) {
	line := clean(fmt.Sprintf(format, args...))
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.live != nil {
		p.live.say(line)
		return
	}
	fmt.Fprintln(p.w, line)
}

// change calls change, which may change the view and how it is drawn.
func (p *progress) change(change func(f *frame)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.live == nil {
		change(new(frame))
		return
	}
	p.live.update(func() { change(&p.live.frame) })
}

// close ends the picture, whatever it shows.
func (p *progress) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.live != nil {
		p.live.close()
		p.live = nil
	}
}

func (p *progress) summary(e spirt.Event) {
	fmt.Fprintf(p.w, "done: accuracy %.2f %% on the test samples after %d rounds in %.1f s\n", 100**e.Accuracy, e.Rounds, e.Seconds)
	if why := map[string]string{
		"target": "the target accuracy is reached", "converged": "no validation was an improvement for as long as --patience says",
		"time": "the time for the run is up", "money": "the budget is spent",
	}[e.StopReason]; why != "" {
		fmt.Fprintf(p.w, "stopped at this record by all peers: %s\n", why)
	}
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
	if e.CostUSD != nil {
		fmt.Fprintf(p.w, "cost %v; try: spirt bill %s\n", *e.CostUSD, e.Run)
	}
	fmt.Fprintf(p.w, "model in %s/model.safetensors; try: spirt eval --run %s\n", e.Run, e.Run)
}
