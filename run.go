package spirt

import (
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
	"strconv"
	"strings"
	"time"

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
	// Verbose has the peers log every action of the round protocol.
	Verbose bool
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
	_, data, err := job.open()
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
	if err := createRun(cfg.Dir, job); err != nil {
		return Event{}, err
	}
	for i := range job.Peers {
		if len(cfg.Databases) == 0 {
			break
		}
		url := cfg.Databases[min(i, len(cfg.Databases)-1)]
		if err := (settings{Listen: listen[i], Database: url}).write(peerDir(cfg.Dir, i+1)); err != nil {
			return Event{}, err
		}
	}
	r := &run{dir: cfg.Dir, job: job, data: data, started: time.Now(), onEvent: cfg.OnEvent, peers: make([]child, job.Peers)}
	if r.log, err = events.OpenLog(filepath.Join(cfg.Dir, eventsFile)); err != nil {
		return Event{}, err
	}
	defer r.log.Close()
	if r.tail, err = events.OpenTail(filepath.Join(cfg.Dir, eventsFile)); err != nil {
		return Event{}, err
	}
	defer r.tail.Close()
	if err := r.record("running", nil); err != nil {
		return Event{}, err
	}
	exits, err := r.start(cfg, listen)
	if err != nil {
		r.kill()
		return Event{}, errors.Join(err, r.record("failed", nil))
	}
	interrupted := r.watch(ctx, exits)
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
	dir     string
	job     Job
	data    *dataset.Dataset
	started time.Time
	onEvent func(Event, []byte)
	log     *events.Log
	tail    *events.Tail
	peers   []child
}

// child is one peer's process and what it said last.
type child struct {
	cmd   *exec.Cmd
	state string // started, finished, stopped, failed or crashed
	cause string // for people: how it ended
	round uint64
	model string
	usage Usage
}

type exit struct {
	peer int // index
	err  error
}

// start spawns every peer. Each is the leader of a process group and writes
// to files only, so that it lives on when this process is killed.
func (r *run) start(cfg TrainConfig, listen []string) (<-chan exit, error) {
	exits := make(chan exit, len(r.peers))
	for i := range r.peers {
		n := i + 1
		log, err := os.OpenFile(filepath.Join(peerDir(r.dir, n), logFile), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			return nil, err
		}
		cmd := exec.Command(cfg.Executable, "peer", "--run", r.dir, "--peer", strconv.Itoa(n), "--listen", listen[i])
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
		r.peers[i].cmd = cmd
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
	_ = r.log.Emit(Event{Event: "peer", Peer: i + 1, State: state, PID: p.cmd.Process.Pid, Message: cause})
}

// watch passes events on until all peers have ended, and reports whether ctx
// was cancelled.
func (r *run) watch(ctx context.Context, exits <-chan exit) (interrupted bool) {
	// Who gets the events may block this goroutine: the peers stop all the same.
	stop := context.AfterFunc(ctx, func() {
		for i := range r.peers {
			interrupt(r.peers[i].cmd.Process)
		}
	})
	defer stop()
	tick := time.NewTicker(pollEvents)
	defer tick.Stop()
	done, grace := ctx.Done(), (<-chan time.Time)(nil)
	for running := len(r.peers); running > 0; {
		select {
		case e := <-exits:
			running--
			interrupted = ctx.Err() != nil
			state, cause := exitState(e.err, interrupted)
			r.setState(e.peer, state, cause)
		case <-tick.C:
			r.drain()
		case <-done:
			done = nil
			grace = time.After(stopGrace)
		case <-grace:
			r.kill()
		}
	}
	r.drain()
	return interrupted
}

// drain passes on what has been appended to the event log.
func (r *run) drain() {
	lines, events, err := r.tail.Next()
	if err != nil {
		return // the log is this process's own folder: it comes back or the run ends by itself
	}
	for i, e := range events {
		if e.Event == "round" && e.Peer >= 1 && e.Peer <= len(r.peers) {
			p := &r.peers[e.Peer-1]
			p.round, p.model = e.Round, e.Model
			if e.Used != nil {
				p.usage = *e.Used
			}
		}
		if r.onEvent != nil {
			r.onEvent(e, lines[i])
		}
	}
}

func (r *run) kill() {
	for i := range r.peers {
		if cmd := r.peers[i].cmd; cmd != nil {
			_ = cmd.Process.Kill() // it may have ended already
		}
	}
}

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
		return "crashed", exited.Error()
	}
	return "failed", exited.Error()
}

// finish evaluates the model that the surviving peers left and reports the
// run as done.
func (r *run) finish(interrupted bool) (Event, error) {
	done := Event{Event: "done", Run: r.dir, StopReason: "rounds", Usage: &Usage{}}
	models := map[string]int{}
	survivors := 0
	for i, p := range r.peers {
		done.Peers = append(done.Peers, PeerDone{Peer: i + 1, State: p.state, Round: p.round, Model: p.model})
		done.Invocations += p.usage.Invocations
		done.GBSeconds += p.usage.GBSeconds
		done.Bytes += p.usage.Bytes
		done.Timeouts += p.usage.Timeouts
		if p.state == "finished" {
			survivors++
			models[p.model]++
			done.Rounds, done.Model = max(done.Rounds, p.round), p.model
		}
	}
	done.Seconds = time.Since(r.started).Seconds()
	state, err := "done", error(nil)
	switch {
	case interrupted:
		state, err = "interrupted", ErrInterrupted
	case survivors == 0:
		state, err = "failed", r.failure()
	case len(models) > 1:
		state, err = "failed", fmt.Errorf("the peers ended with %d different models: see %s", len(models), filepath.Join(r.dir, eventsFile))
	default:
		if err = r.evaluate(&done); err != nil {
			state = "failed"
		}
	}
	switch {
	case err != nil:
		done.StopReason = state
	case done.Rounds < uint64(r.job.Rounds):
		done.StopReason = "target"
	}
	err = errors.Join(err, r.log.Emit(done), r.record(state, &done))
	r.drain()
	return done, err
}

// evaluate adds the accuracy and the loss on the test images, which nothing
// has seen before, of the model that the peers left.
func (r *run) evaluate(done *Event) error {
	trained, err := ReadModel(filepath.Join(r.dir, modelFile))
	if err != nil {
		return err
	}
	if h := trained.Hash().String(); h != done.Model {
		return fmt.Errorf("the model file has the hash %s, the peers ended with %s", h, done.Model)
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
