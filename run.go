package spirt

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"github.com/spirt-ml/spirt/events"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spirt-ml/spirt/bill"
	"github.com/spirt-ml/spirt/dataset"
	"github.com/spirt-ml/spirt/function"
	"github.com/spirt-ml/spirt/tensordb"
)

// ErrInterrupted is returned by Train when its context was cancelled.
var ErrInterrupted = errors.New("interrupted")

// A UsageError says that what the caller asked for is not possible. Nothing
// was started.
type UsageError struct{ Err error }

func (e *UsageError) Error() string { return e.Err.Error() }
func (e *UsageError) Unwrap() error { return e.Err }

// TrainConfig is what Train needs beside the job.
type TrainConfig struct {
	// Dir is the run folder, which must not exist.
	Dir string
	// Executable is the spirt binary that the peers run. Default: this
	// process's own.
	Executable string
	// Listen is the address of peer 1, as host:port; peer n takes the port
	// n-1 above it. Default: 127.0.0.1 with a free port for each.
	Listen string
	// Databases are URLs of databases in other processes: one for each peer, or
	// one that all share, each with keys of its own. Default: each peer has one
	// in its own process.
	Databases []string
	// Prices is the name of a built-in table of prices, or a file with one, by
	// which the run is billed. Default: bill.Default.
	Prices string
	// Kill ends the peers at once when it is closed, without a checkpoint.
	Kill <-chan struct{}
	// Verbose has the peers log every action of the round protocol.
	Verbose bool
	// Stragglers is how long those who have not finished may go without a round
	// once others have finished, beside the time for a state and three times that
	// of the slowest round: a peer that hung when the others left would never
	// end. Default: a minute.
	Stragglers time.Duration
	// OnEvent is called with every event of the run in order, and with the
	// line that stands in events.jsonl. It may be nil.
	OnEvent func(e Event, line []byte)
}

// pollEvents is how often the event log is looked at.
const pollEvents = 50 * time.Millisecond

// stopGrace is how long peers that were asked to stop may take.
const stopGrace = 10 * time.Second

// Train makes a run folder, starts one process for each peer of the job in it
// and watches them until the last has ended. It coordinates nothing: a peer
// finds the others through the folder, and when the caller dies the peers
// train on. A cancelled ctx stops the peers and returns ErrInterrupted.
//
// The event returned is the run's "done".
func Train(ctx context.Context, job Job, cfg TrainConfig) (Event, error) {
	if err := job.Resolve(); err != nil {
		return Event{}, &UsageError{err}
	}
	job.Data = absoluteData(job.Data)
	model, data, err := job.open()
	if err != nil {
		return Event{}, &UsageError{err}
	}
	if cfg.Executable == "" {
		cfg.Executable = function.Self()
	}
	listen, err := peerAddresses(cfg.Listen, job.Peers)
	if err != nil {
		return Event{}, &UsageError{err}
	}
	if err := checkDatabases(cfg.Databases, job.Peers); err != nil {
		return Event{}, &UsageError{err}
	}
	prices := bill.Default()
	if cfg.Prices != "" {
		if prices, err = bill.Open(cfg.Prices); err != nil {
			return Event{}, &UsageError{fmt.Errorf("prices: %w", err)}
		}
	}
	if err := createRun(cfg.Dir, job); err != nil {
		return Event{}, err
	}
	if err := bill.Write(filepath.Join(cfg.Dir, pricesFile), prices); err != nil {
		return Event{}, err
	}
	for i := range job.Peers {
		if len(cfg.Databases) == 0 && cfg.Listen == "" {
			break
		}
		s := settings{Listen: listen[i]}
		if n := len(cfg.Databases); n > 0 {
			s.Database = cfg.Databases[min(i, n-1)]
		}
		if err := s.write(peerDir(cfg.Dir, i+1)); err != nil {
			return Event{}, err
		}
	}
	r := &run{dir: cfg.Dir, job: job, data: data, transfer: job.transferTime(model.NumParams()), prices: prices, started: time.Now(), onEvent: cfg.OnEvent, peers: make([]child, job.Peers)}
	for i := range r.peers {
		r.peers[i].listen = listen[i]
	}
	return r.run(ctx, cfg, "started")
}

// Resume goes on with a run whose peers have stopped, or of which some have:
// those that run still are watched, the others are started again. What the run
// folder says counts; of cfg only Dir, Executable, Kill, Verbose and OnEvent
// do. A run that is done is not touched: its "done" is returned.
func Resume(ctx context.Context, cfg TrainConfig) (Event, error) {
	info, err := ReadRun(cfg.Dir)
	if errors.Is(err, os.ErrNotExist) {
		return Event{}, &UsageError{fmt.Errorf("%s is no run of `spirt train`: it has no %s (a job of several machines goes on with `spirt peer %s`)", cfg.Dir, recordFile, cfg.Dir)}
	} else if err != nil {
		return Event{}, err
	}
	if info.State == "done" && info.Done != nil {
		return *info.Done, nil
	}
	job, _, err := loadJob(cfg.Dir)
	if err != nil {
		return Event{}, err
	}
	model, data, err := job.open()
	if err != nil {
		return Event{}, &UsageError{err}
	}
	prices, err := PricesOf(cfg.Dir)
	if err != nil {
		return Event{}, err
	}
	r := &run{dir: cfg.Dir, job: job, data: data, transfer: job.transferTime(model.NumParams()), prices: prices, started: info.Started, onEvent: cfg.OnEvent, peers: make([]child, job.Peers)}
	return r.run(ctx, cfg, "resumed")
}

// PricesOf returns the table of prices of a run folder, the default where it
// has none.
func PricesOf(dir string) (*bill.Table, error) {
	path := filepath.Join(dir, pricesFile)
	t, err := bill.Load(path)
	if errors.Is(err, os.ErrNotExist) {
		return bill.Default(), nil
	}
	return t, err
}

// run starts the peers that do not run, and watches all.
func (r *run) run(ctx context.Context, cfg TrainConfig, how string) (Event, error) {
	if cfg.Executable == "" {
		cfg.Executable = function.Self()
	}
	unlock, err := LockFolder(r.dir)
	if err != nil {
		return Event{}, &UsageError{err}
	}
	defer unlock()
	path := filepath.Join(r.dir, eventsFile)
	if r.log, err = events.OpenLog(path); err != nil {
		return Event{}, err
	}
	defer r.log.Close()
	if r.tail, err = events.OpenTail(path); err != nil {
		return Event{}, err
	}
	defer r.tail.Close()
	told := r.onEvent
	r.onEvent = nil
	r.drain() // what was before
	r.onEvent = told
	for i := range r.peers { // of an earlier life
		r.peers[i].reason = ""
	}
	_ = r.log.Emit(Event{Event: "run", State: how, Run: r.dir}) // a full disk must not keep it from going on
	if err := r.record("running", nil); err != nil {
		return Event{}, err
	}
	exits, err := r.start(cfg)
	if err != nil {
		r.kill(func(p child) bool { return p.own }) // the others were well before
		return Event{}, errors.Join(err, r.record("failed", nil))
	}
	interrupted := r.watch(ctx, cfg.Kill, cmp.Or(cfg.Stragglers, time.Minute)+2*r.transfer, exits)
	return r.finish(interrupted)
}

// checkDatabases reports what is wrong with the URLs of the peers' databases.
func checkDatabases(urls []string, peers int) error {
	if n := len(urls); n > 1 && n != peers {
		return fmt.Errorf("%d databases for %d peers: name one for each, or one for all", n, peers)
	}
	for _, url := range urls {
		if _, err := tensordb.ParseAddress(url); err != nil {
			return err
		}
	}
	return nil
}

// newFolder makes a run folder.
func newFolder(dir string) error {
	if err := os.MkdirAll(dirOf(dir), 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); errors.Is(err, os.ErrExist) {
		return &UsageError{fmt.Errorf("the run folder %s exists: name another with --run, or remove it", dir)}
	} else if err != nil {
		return fmt.Errorf("making the run folder: %w", err)
	}
	return nil
}

// createRun makes the folder of a new run with its job, its identities, its
// admin key and its roster.
func createRun(dir string, job Job) error {
	if err := newFolder(dir); err != nil {
		return err
	}
	g, admin, err := createJob(dir, job)
	if err != nil {
		return err
	}
	return createIdentities(dir, g, admin, job)
}

// run is a run as the process sees it that started the peers.
type run struct {
	dir      string
	job      Job
	data     *dataset.Dataset
	transfer time.Duration // that a state may take
	prices   *bill.Table
	started  time.Time
	view     events.View
	onEvent  func(Event, []byte)
	log      *events.Log
	tail     *events.Tail
	peers    []child
	moved    time.Time     // when a peer last told of a round or its end
	slowest  time.Duration // of the rounds
}

// child is one peer's process and what it said last.
type child struct {
	process *os.Process // of one that runs already, found by its lock, or started here
	own     bool        // this process started it
	listen  string      // empty: as in its settings
	state   string      // started, finished, stopped, failed or crashed
	cause   string      // for people: how it ended
	round   uint64
	model   string
	reason  string // why the run ended for it, once it has finished
}

type exit struct {
	peer int // index
	err  error
}

// start spawns every peer that does not run. Each is the leader of a process
// group and writes to files only, so that it lives on when this process is
// killed.
func (r *run) start(cfg TrainConfig) (<-chan exit, error) {
	exits := make(chan exit, len(r.peers))
	for i := range r.peers {
		n := i + 1
		if pid, gone := awaitPeer(r.dir, n); gone != nil {
			process, err := os.FindProcess(pid)
			if err != nil {
				return nil, fmt.Errorf("finding peer %d, process %d: %w", n, pid, err)
			}
			r.peers[i].process = process
			r.setState(i, "started", "it was running already")
			go func() { exits <- exit{i, <-gone} }() // ends with the process
			continue
		}
		log, err := os.OpenFile(filepath.Join(peerDir(r.dir, n), logFile), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			return nil, err
		}
		cmd := exec.Command(cfg.Executable, "peer", "--run", r.dir, "--peer", strconv.Itoa(n))
		if at := r.peers[i].listen; at != "" {
			cmd.Args = append(cmd.Args, "--listen", at)
		}
		if cfg.Verbose {
			cmd.Args = append(cmd.Args, "--verbose")
		}
		cmd.Args[0] = "spirt" // for those who list processes
		cmd.Stdout, cmd.Stderr = log, log
		cmd.Env = append(os.Environ(), peerEnv(len(r.peers))...)
		ownGroup(cmd)
		err = cmd.Start()
		log.Close() // the child has its own
		if err != nil {
			return nil, fmt.Errorf("starting peer %d: %w", n, err)
		}
		r.peers[i].process, r.peers[i].own = cmd.Process, true
		r.setState(i, "started", "")
		go func() { exits <- exit{i, cmd.Wait()} }() // ends with the process
	}
	return exits, nil
}

// peerEnv returns what is set in the environment of each of so many peers on
// this machine. They share its CPUs: a peer that ran on all of them would
// spend its time waking threads. Who sets GOMAXPROCS decides otherwise.
func peerEnv(peers int) []string {
	if os.Getenv("GOMAXPROCS") != "" {
		return nil
	}
	return []string{"GOMAXPROCS=" + strconv.Itoa(max(1, runtime.NumCPU()/peers))}
}

// setState notes and reports the state of peer i.
func (r *run) setState(i int, state, cause string) {
	p := &r.peers[i]
	p.state, p.cause = state, cause
	// A full disk must not end the run: the peers go on without the event.
	_ = r.log.Emit(Event{Event: "peer", Peer: i + 1, State: state, PID: p.process.Pid, Message: cause})
}

// watch passes events on until all peers have ended, and reports whether ctx
// was cancelled.
func (r *run) watch(ctx context.Context, kill <-chan struct{}, stragglers time.Duration, exits <-chan exit) (interrupted bool) {
	// Who gets the events may block this goroutine: the peers stop all the same.
	stop := context.AfterFunc(ctx, func() {
		for i := range r.peers {
			interrupt(r.peers[i].process)
		}
	})
	defer stop()
	r.moved = time.Now()
	tick := time.NewTicker(pollEvents)
	defer tick.Stop()
	done, grace := ctx.Done(), (<-chan time.Time)(nil)
	for running := len(r.peers); running > 0; {
		select {
		case e := <-exits:
			running--
			interrupted = ctx.Err() != nil
			r.drain() // it may have told that it finished
			state, cause := exitState(e.err, interrupted)
			if errors.Is(e.err, errNotOurs) {
				state, cause = r.lostState(e.peer, interrupted)
			}
			r.setState(e.peer, state, cause)
		case now := <-tick.C:
			r.drain()
			if grace == nil && now.Sub(r.moved) > stragglers+3*r.slowest && r.leaveBehind() {
				grace = time.After(stopGrace)
			}
		case <-done:
			done = nil
			grace = time.After(stopGrace)
		case <-grace:
			r.kill(all)
		case <-kill:
			kill = nil
			r.kill(all)
		}
	}
	r.drain()
	return interrupted
}

// drain passes on what has been appended to the event log.
func (r *run) drain() {
	// An error is of this process's own folder: it comes back, or the run ends by itself.
	_ = r.tail.EachLine(func(line []byte, e *Event) {
		r.view.Add(e)
		if e.Peer >= 1 && e.Peer <= len(r.peers) {
			switch p := &r.peers[e.Peer-1]; e.Event {
			case "round":
				p.round, p.model = e.Round, e.Model
				r.moved = time.Now()
				if took := time.Duration(e.Seconds * float64(time.Second)); took < time.Hour {
					r.slowest = max(r.slowest, took)
				}
			case "finished":
				p.round, p.model, p.reason = e.Round, e.Model, e.StopReason
				r.moved = time.Now()
			}
		}
		if r.onEvent != nil {
			r.onEvent(*e, bytes.Clone(line))
		}
	})
}

// leaveBehind asks those to stop that have not finished, if others have.
func (r *run) leaveBehind() bool {
	finished := func(p child) bool { return p.state == "finished" }
	if !slices.ContainsFunc(r.peers, finished) {
		return false
	}
	for i, p := range r.peers {
		if p.state == "started" {
			r.warn(i, "it is stopped: peers have finished, and it gets no further without them; the model is complete")
			interrupt(p.process)
		}
	}
	return true
}

// warn tells what is wrong with peer i.
func (r *run) warn(i int, text string) {
	_ = r.log.Emit(Event{Event: "warning", Cause: events.CauseProtocol, Peer: i + 1, Message: text}) // as setState
}

func (r *run) kill(which func(child) bool) {
	for _, p := range r.peers {
		if p.process != nil && p.state == "started" && which(p) {
			_ = p.process.Kill() // it may have ended already
		}
	}
}

func all(child) bool { return true }

// exitState names how a peer's process ended.
func exitState(err error, interrupted bool) (state, cause string) {
	var exited *exec.ExitError
	switch {
	case err == nil:
		return "finished", ""
	case !errors.As(err, &exited):
		return "failed", err.Error()
	case exited.ExitCode() == ExitInterrupted || interrupted:
		return "stopped", exited.Error()
	case exited.ExitCode() < 0:
		return "crashed", exited.Error() + outOfMemory(exited)
	}
	return "failed", exited.Error()
}

// errNotOurs ends a peer that this process did not start.
var errNotOurs = errors.New("ended")

// lostState says how a peer ended whose exit code nobody has.
func (r *run) lostState(i int, interrupted bool) (state, cause string) {
	switch {
	case r.peers[i].reason != "":
		return "finished", ""
	case interrupted:
		return "stopped", "it was asked to"
	}
	return "crashed", "it ended without having finished"
}

// finish evaluates the model that the surviving peers left and reports the
// run as done.
func (r *run) finish(interrupted bool) (Event, error) {
	cost := r.prices.Cost(r.view.Usage).Total()
	done := Event{Event: "done", Time: time.Now().UTC(), Run: r.dir, StopReason: "rounds", CostUSD: &cost, Usage: &Usage{
		Invocations: int(r.view.Functions.Invocations), GBSeconds: r.view.Usage.GBSeconds(), Bytes: r.view.Usage.BytesOut,
	}}
	for i, p := range r.peers {
		done.Peers = append(done.Peers, PeerDone{Peer: i + 1, State: p.state, Round: p.round, Model: p.model})
		if v := r.view.Peer(i + 1); v != nil {
			done.Timeouts += v.Timeouts
		}
	}
	models := r.models()
	done.Seconds = r.view.Elapsed().Seconds()
	state, err := "done", error(nil)
	// Somebody else may have stopped them, as `spirt stop` does.
	stopped := !slices.ContainsFunc(r.peers, func(p child) bool { return p.state != "stopped" })
	switch {
	case interrupted || stopped:
		state, err = "interrupted", ErrInterrupted
	case len(models) == 0:
		state, err = "failed", r.failure()
	case len(models) > 1 && len(models[0]) <= len(r.peers)/2:
		state, err = "failed", fmt.Errorf("the peers ended with %d different models: see %s", len(models), filepath.Join(r.dir, eventsFile))
	default:
		for _, apart := range models[1:] { // they were cut off, and trained on alone
			for _, i := range apart {
				r.warn(i, "it ended with another model than most peers, as one does that was cut off and trained on alone: theirs counts")
			}
		}
		if err = r.evaluate(&done, models[0]); err != nil {
			state = "failed"
		}
	}
	if err != nil {
		done.StopReason = state
	}
	err = errors.Join(err, r.log.Emit(done), r.record(state, &done))
	r.drain()
	return done, err
}

// models returns which peers finished with the same model, most first.
func (r *run) models() [][]int {
	var out [][]int
	for i, p := range r.peers {
		if p.state != "finished" {
			continue
		}
		at := slices.IndexFunc(out, func(alike []int) bool { return r.peers[alike[0]].model == p.model })
		if at < 0 {
			at, out = len(out), append(out, nil)
		}
		out[at] = append(out[at], i)
	}
	slices.SortStableFunc(out, func(a, b []int) int { return len(b) - len(a) })
	return out
}

// evaluate adds what these peers ended with, and the accuracy and the loss of
// their model on the test images, which nothing has seen before.
func (r *run) evaluate(done *Event, alike []int) error {
	for _, i := range alike {
		p := &r.peers[i]
		done.Rounds, done.Model = max(done.Rounds, p.round), p.model
		orString(&p.reason, done.StopReason)
		done.StopReason = p.reason
	}
	trained, err := r.trained(alike, done.Model)
	if err != nil {
		return err
	}
	_, _, test := r.data.Split()
	accuracy, loss, err := trained.Evaluate(r.data, test)
	if err != nil {
		return err
	}
	done.Accuracy, done.Loss = &accuracy, &loss
	return nil
}

// failure says why no peer finished, in the words of the first that failed.
func (r *run) failure() error {
	for i, p := range r.peers {
		if p.state == "failed" {
			return fmt.Errorf("peer %d failed: %s", i+1, lastLines(filepath.Join(peerDir(r.dir, i+1), logFile), p.cause))
		}
	}
	return fmt.Errorf("no peer finished: peer 1 %s: %s", r.peers[0].state, r.peers[0].cause)
}

// lastLines returns the end of a log, or otherwise if there is none.
func lastLines(path, otherwise string) string {
	const most = 2 << 10
	f, err := os.Open(path)
	if err != nil {
		return otherwise
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > most {
		if _, err := f.Seek(-most, io.SeekEnd); err != nil {
			return otherwise
		}
	}
	b, err := io.ReadAll(io.LimitReader(f, most))
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	if text := strings.Join(lines[max(0, len(lines)-3):], "\n"); err == nil && text != "" {
		return text
	}
	return otherwise
}

// trained returns the model of these peers. Where one that trained on alone was
// the first to leave its model in the run folder, theirs takes its place.
func (r *run) trained(alike []int, model string) (*Trained, error) {
	path := filepath.Join(r.dir, modelFile)
	t, err := ReadModel(path)
	if err == nil && t.Hash().String() == model {
		return t, nil
	}
	for _, i := range alike {
		if t, err := ReadModel(filepath.Join(peerDir(r.dir, i+1), modelFile)); err == nil && t.Hash().String() == model {
			return t, t.Write(path)
		}
	}
	if err == nil {
		err = fmt.Errorf("the model file has the hash %s, the peers ended with %s", t.Hash(), model)
	}
	return nil, err
}

func (r *run) record(state string, done *Event) error {
	b, err := json.MarshalIndent(r.describe(RunInfo{
		State: state, Version: Version(), Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH,
		CPUs: runtime.NumCPU(), PID: os.Getpid(), Started: r.started.UTC(), Job: r.job, Done: done,
	}), "", "  ")
	if err != nil {
		return fmt.Errorf("encoding %s: %w", recordFile, err)
	}
	return writeFileAtomic(filepath.Join(r.dir, recordFile), append(b, '\n'), 0o644)
}
