package spirt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"time"

	"github.com/spirt-ml/spirt/events"
)

// PeerProcess is a peer of a run folder, and the process that runs it on this
// machine.
type PeerProcess struct {
	Peer    int  `json:"peer"`
	Running bool `json:"running"`       // a process holds its lock
	PID     int  `json:"pid,omitempty"` // 0: it does not run, or has just been started
}

// Processes returns the peers that a run folder has, ascending. They are found
// by their locks, so it does not matter who started them and whether that
// process still is there.
func Processes(dir string) ([]PeerProcess, error) {
	entries, err := os.ReadDir(filepath.Join(dir, peersDir))
	if errors.Is(err, os.ErrNotExist) {
		return nil, &UsageError{fmt.Errorf("%s is no run folder: it has no folder %s", dir, peersDir)}
	} else if err != nil {
		return nil, fmt.Errorf("looking for the peers of the run: %w", err)
	}
	var out []PeerProcess
	for _, e := range entries {
		n, err := strconv.Atoi(e.Name())
		if err != nil || n < 1 || strconv.Itoa(n) != e.Name() {
			continue
		}
		p := PeerProcess{Peer: n}
		if p.Running, p.PID, err = holder(peerLock(dir, n)); err != nil {
			return nil, fmt.Errorf("looking for the process of peer %d: %w", n, err)
		}
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b PeerProcess) int { return a.Peer - b.Peer })
	return out, nil
}

func peerLock(dir string, n int) string { return filepath.Join(peerDir(dir, n), lockFileName) }

// PeerLog returns the path of what a peer of a run folder and its functions
// wrote.
func PeerLog(dir string, n int) string { return filepath.Join(peerDir(dir, n), logFile) }

// RunStatus is a run as its folder and its processes tell.
type RunStatus struct {
	Dir string
	// State is running, done, failed, interrupted, or dead: its peers ended
	// without having finished, and nobody said why.
	State   string
	Job     Job
	Starter int // process that started the peers and watches them; 0: gone
	Peers   []PeerProcess
	View    *events.View
	// Resume is the command by which the run, or what is missing of it, goes
	// on; empty if there is nothing to go on with.
	Resume string
}

// StatusOf returns the status of the run in a folder, also of one peer of a job
// of several machines.
func StatusOf(dir string) (*RunStatus, error) {
	s := &RunStatus{Dir: dir}
	if err := s.Look(); err != nil {
		return nil, err
	}
	var err error
	if s.View, err = ViewOf(dir); errors.Is(err, os.ErrNotExist) {
		s.View = new(events.View) // it has just been made
	} else if err != nil {
		return nil, fmt.Errorf("reading the events of the run: %w", err)
	}
	if s.Job, _, err = loadJob(dir); err != nil {
		return nil, err
	}
	s.Judge()
	return s, nil
}

// Look looks for the run's processes.
func (s *RunStatus) Look() (err error) {
	if s.Peers, err = Processes(s.Dir); err != nil {
		return err
	}
	held, pid, err := holder(filepath.Join(s.Dir, lockFileName))
	if err != nil {
		return fmt.Errorf("looking for the process that started the run: %w", err)
	}
	s.Starter = 0
	if held {
		s.Starter = pid
	}
	return nil
}

// Judge concludes from processes and events what state the run and its peers
// are in. A peer that tells no more and is not there is "gone".
func (s *RunStatus) Judge() {
	running, missing := s.Starter != 0, 0
	finished, stopped := len(s.Peers) > 0, len(s.Peers) > 0
	for _, p := range s.Peers {
		running = running || p.Running
		v := s.View.Peer(p.Peer)
		if v != nil && !p.Running && v.State == "started" {
			v.State, v.Waiting = "gone", nil
		} else if v != nil && p.Running && (v.State == "gone" || v.State == "") {
			v.State = "started"
		}
		ended := v != nil && v.State == "finished"
		finished = finished && ended
		stopped = stopped && (ended || v != nil && v.State == "stopped")
		if !ended && !p.Running {
			missing = p.Peer
		}
	}
	info, err := ReadRun(s.Dir)
	started := err == nil // by `spirt train`
	s.Resume = ""
	switch {
	case running:
		s.State = "running"
		if missing != 0 {
			s.Resume = fmt.Sprintf("spirt peer --run %s --peer %d", s.Dir, missing)
		}
		return
	case started && info.State != "running":
		s.State = info.State
	case finished:
		s.State = "done"
	case stopped:
		s.State = "interrupted"
	default:
		s.State = "dead"
	}
	switch {
	case s.State == "done" && (!started || info.Done != nil):
	case started:
		s.Resume = "spirt train --resume " + s.Dir
	default:
		s.Resume = "spirt peer " + s.Dir
	}
}

// LatestRun returns the run folder in parent in which something happened last.
func LatestRun(parent string) (string, error) {
	entries, err := os.ReadDir(parent)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("looking for runs: %w", err)
	}
	latest, at := "", time.Time{}
	for _, e := range entries {
		dir := filepath.Join(parent, e.Name())
		for _, name := range []string{eventsFile, genesisFile} {
			if info, err := os.Stat(filepath.Join(dir, name)); err == nil && info.ModTime().After(at) {
				latest, at = dir, info.ModTime()
			}
		}
	}
	if latest == "" {
		return "", &UsageError{fmt.Errorf("there is no run in the folder %s: name a run folder", parent)}
	}
	return latest, nil
}

// StopConfig says how peers are stopped.
type StopConfig struct {
	// Peers says which; none are all.
	Peers []int
	// Timeout is how long they may take until they are killed. Default: 15 s.
	Timeout time.Duration
	// Now kills them at once, without a checkpoint.
	Now bool
}

// StoppedPeer is what became of a peer.
type StoppedPeer struct {
	Peer int `json:"peer"`
	PID  int `json:"pid,omitempty"`
	// State is stopped, killed, absent if it did not run, or running if it
	// could not be stopped; Message then says why.
	State   string `json:"state"`
	Message string `json:"message,omitempty"`
}

// killGrace is how long a killed process may take to be gone.
const killGrace = 5 * time.Second

// StopPeers asks peers of a run folder to stop, waits until they are gone, and
// kills those that take too long. On Windows, where a process cannot be asked,
// they are ended. It only ever signals a process that holds a peer's lock.
//
// When ctx is cancelled it waits no longer; what was asked to stop may still.
func StopPeers(ctx context.Context, dir string, cfg StopConfig) ([]StoppedPeer, error) {
	orDefault := func(d time.Duration) time.Duration {
		if d <= 0 {
			return 15 * time.Second
		}
		return d
	}
	all, err := Processes(dir)
	if err != nil {
		return nil, err
	}
	out := make([]StoppedPeer, 0, len(all))
	for _, p := range all {
		if len(cfg.Peers) == 0 || slices.Contains(cfg.Peers, p.Peer) {
			out = append(out, StoppedPeer{Peer: p.Peer, PID: p.PID, State: "absent"})
		}
	}
	for _, n := range cfg.Peers {
		if !slices.ContainsFunc(out, func(p StoppedPeer) bool { return p.Peer == n }) {
			return nil, &UsageError{fmt.Errorf("%s has no peer %d: `spirt status %s` lists its peers", dir, n, dir)}
		}
	}
	timeout := time.NewTimer(orDefault(cfg.Timeout))
	defer timeout.Stop()
	tick := time.NewTicker(pollEvents)
	defer tick.Stop()
	kill, end := cfg.Now, timeout.C
	if kill {
		end = time.After(killGrace)
	}
	for {
		running := 0
		for i := range out {
			p := &out[i]
			if err := stopPeer(dir, p, kill); err != nil {
				p.Message = err.Error()
			}
			if p.State == "running" {
				running++
			}
		}
		if running == 0 {
			tellStopped(dir, out)
			return out, nil
		}
		select {
		case <-ctx.Done():
			return out, ctx.Err()
		case <-tick.C:
		case <-end:
			if kill {
				return out, fmt.Errorf("%d peers of %s could not be stopped", running, dir)
			}
			kill, end = true, time.After(killGrace)
		}
	}
}

// tellStopped adds to the events that peers were stopped, unless the process
// that started them does.
func tellStopped(dir string, peers []StoppedPeer) {
	if held, _, err := holder(filepath.Join(dir, lockFileName)); err != nil || held {
		return
	}
	log, err := events.OpenLog(filepath.Join(dir, eventsFile))
	if err != nil {
		return // they are stopped all the same
	}
	defer log.Close()
	for _, p := range peers {
		switch p.State {
		case "stopped":
			_ = log.Emit(Event{Event: "peer", Peer: p.Peer, State: "stopped", PID: p.PID})
		case "killed":
			_ = log.Emit(Event{Event: "peer", Peer: p.Peer, State: "stopped", PID: p.PID, Message: "it was killed"})
		}
	}
}

// What StoppedPeer.Message is while a peer was signalled and still runs.
const (
	askedToStop = "asked to stop"
	wasKilled   = "killed"
)

// stopPeer looks at a peer, and signals it if it runs and was not signalled.
func stopPeer(dir string, p *StoppedPeer, kill bool) error {
	held, pid, err := holder(peerLock(dir, p.Peer))
	if err != nil {
		return err
	}
	if !held {
		if p.State == "running" {
			p.State = "stopped"
			if p.Message == wasKilled {
				p.State = "killed"
			}
			p.Message = ""
		}
		return nil
	}
	message, send := askedToStop, interrupt
	if kill {
		message, send = wasKilled, func(p *os.Process) { _ = p.Kill() }
	}
	if p.State == "running" && p.Message == message && p.PID == pid {
		return nil // on its way
	}
	p.State, p.PID = "running", pid
	if pid == 0 { // it has just been started: the next look tells
		return nil
	}
	if err := signalHolder(peerLock(dir, p.Peer), pid, send); err != nil {
		return err
	}
	p.Message = message
	return nil
}

// signalHolder signals the process that holds a lock, and no other: a number
// in a file may be that of a process which ended, and now another's.
func signalHolder(lock string, pid int, send func(*os.Process)) error {
	process, err := os.FindProcess(pid) // on Linux a handle: whatever happens, it is this process
	if err != nil {
		return err
	}
	defer process.Release()
	held, now, err := holder(lock)
	switch {
	case err != nil:
		return err
	case !held || now != pid:
		return nil // it has ended: the next look tells
	case !hasOpen(pid, lock):
		return fmt.Errorf("its lock names process %d, which does not have it: end the process that runs it by hand", pid)
	}
	send(process)
	return nil
}

// hasOpen reports whether a process has a file open, as who holds its lock
// has. Where the system does not tell, it is believed.
func hasOpen(pid int, path string) bool {
	file, err := os.Stat(path)
	if runtime.GOOS != "linux" || err != nil {
		return err == nil
	}
	if _, err := os.Stat("/proc/self/fd"); err != nil {
		return true
	}
	open := filepath.Join("/proc", strconv.Itoa(pid), "fd")
	entries, err := os.ReadDir(open)
	if err != nil {
		return false // it has ended, or is another user's
	}
	return slices.ContainsFunc(entries, func(e os.DirEntry) bool {
		info, err := os.Stat(filepath.Join(open, e.Name()))
		return err == nil && os.SameFile(info, file)
	})
}
