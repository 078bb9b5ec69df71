package function

import (
	"cmp"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os/exec"
	"runtime"
	"sync"
	"time"
)

type state uint8

const (
	stateStarting state = iota // has not polled yet
	stateIdle                  // polls, and is in Platform.idle
	stateBusy                  // belongs to an attempt, or does not poll
	stateDead
)

func (s state) String() string {
	return [...]string{"starting", "idle", "busy", "ending"}[s]
}

// memoryInterval is the pause between two looks at the resident memory of an instance.
const memoryInterval = 50 * time.Millisecond

// attempt is one run of the function. Its fields but done are guarded by Platform.mu once an instance has it.
type attempt struct {
	payload   []byte
	inv       Invocation
	done      chan outcome // holds one: nobody need be waiting
	delivered time.Time    // when the instance got it; zero: not yet
	finished  bool
}

// instance is one process and the Runtime API that it alone is served. Fields after mu's guard are under Platform.mu.
type instance struct {
	p       *Platform
	cmd     *exec.Cmd
	group   *processGroup
	cell    *cell // nil: not isolated
	out     *output
	server  *http.Server
	serving sync.WaitGroup // requests of the Runtime API
	wake    chan struct{}  // holds one: cur was set
	spawned chan struct{}  // closed when out, group and pid are set: requests wait for it
	gone    chan struct{}  // closed when the process has ended

	pid      int
	started  time.Time
	state    state
	cur      *attempt    // given and not yet followed by a poll
	given    int         // attempts so far
	back     bool        // has answered and not polled again yet: counted in Platform.returning
	polling  bool        // a request for the next invocation is open
	ended    bool        // requests are refused
	timer    *time.Timer // kills it at the deadline of start or attempt
	reaper   *time.Timer // kills it when it has been idle too long
	doomed   error       // why it is being killed; nil: it is not
	initErr  *FunctionError
	resident int64 // bytes
	peak     int64 // bytes
}

// start makes an instance whose first work is a, in room that the caller has acquired. What goes wrong ends a.
func (p *Platform) start(a *attempt) {
	in := &instance{
		p:       p,
		wake:    make(chan struct{}, 1),
		spawned: make(chan struct{}),
		gone:    make(chan struct{}),
		started: time.Now(),
		cur:     a,
		given:   1,
	}
	a.inv.Cold = true
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		a.done <- outcome{inv: a.inv, err: ErrClosed}
		return
	}
	p.all[in] = struct{}{}
	p.owned.Add(1)
	p.mu.Unlock()
	go func() {
		defer p.owned.Done()
		in.live()
	}()
}

// live starts the process, waits for its end and cleans up after it.
func (in *instance) live() {
	p := in.p
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		in.end(&FunctionError{Type: TypeInit, Message: fmt.Sprintf("listening for the Runtime API: %v", err)})
		return
	}
	in.server = &http.Server{
		Handler:           in.runtimeAPI(),
		ReadHeaderTimeout: 10 * time.Second,
		MaxHeaderBytes:    2 << 20, // aws-lambda-go reports causes of up to 1 MiB in a header
		ErrorLog:          slog.NewLogLogger(p.log.Handler(), slog.LevelDebug),
	}
	few := &fewConns{Listener: listener, refused: func() { p.count(func(s *Stats) { s.Refused++ }) }}
	in.serving.Go(func() { in.server.Serve(few) }) // ends with ErrServerClosed
	err = in.spawn(listener.Addr().String())
	defer in.cell.close()
	if err == nil {
		in.serving.Go(in.watchMemory)
		err = in.group.wait(in.cmd)
		in.group.close()
	} else {
		err = fmt.Errorf("starting the process: %w", err)
	}
	close(in.gone)
	p.mu.Lock()
	in.ended = true
	p.mu.Unlock()
	in.server.Close()
	in.serving.Wait()
	in.end(err)
}

// spawn starts the process.
func (in *instance) spawn(address string) (err error) {
	defer close(in.spawned)
	p := in.p
	pid := 0
	in.out, err = newOutput(func(line string) { p.log.Info(line, "instance", pid) })
	if err != nil {
		return err
	}
	stream := in.started.UTC().Format("2006/01/02/[$LATEST]") + newRequestID()
	in.cmd = exec.Command(p.cfg.Command[0], p.cfg.Command[1:]...)
	in.cmd.Dir = p.cfg.Dir
	in.cmd.Env = p.cfg.environ(address, stream)
	in.cmd.Stdout = in.out.w
	in.cmd.Stderr = in.out.w
	in.group = newProcessGroup(in.cmd, p.memory.add())
	if p.isolator != nil {
		in.cell, err = p.isolator.prepare(in.cmd, in.out, address)
	}
	if err == nil {
		err = in.startOnThread()
	}
	if err == nil {
		pid = in.cmd.Process.Pid
	}
	in.out.started() // nothing is read before
	if err == nil {
		if err = in.group.started(in.cmd); err != nil {
			in.cmd.Process.Kill()
			in.cmd.Wait()
		}
	}
	if err != nil {
		in.group.close()
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	in.pid = in.cmd.Process.Pid
	if in.cur != nil {
		in.cur.inv.Instance = in.pid
	}
	if in.doomed != nil { // killed before it was there
		in.group.kill()
		return nil
	}
	if in.state == stateStarting {
		in.timer = time.AfterFunc(p.cfg.InitTimeout, func() { in.expire(nil) })
	}
	p.event("start", in.pid)
	p.log.Debug("instance started", "pid", in.pid)
	return nil
}

// startOnThread starts the process on a thread of its own, which lives as long as the process: on Linux the kernel kills
// a child when the thread that started it ends, not when the process does, and the thread takes on the limits of its child.
func (in *instance) startOnThread() error {
	started := make(chan error, 1)
	var start func()
	start = func() { // ends with the process
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine
		if isMainThread() {    // which does not end, and stands for the whole process to the kernel
			in.serving.Go(start)
			<-in.spawned
			runtime.UnlockOSThread()
			return
		}
		err := in.cell.start(in.cmd)
		started <- err
		if err == nil {
			<-in.gone
		}
	}
	in.serving.Go(start)
	return <-started
}

// end accounts for an instance whose process is gone, or never was, for the given reason.
func (in *instance) end(err error) {
	p := in.p
	p.mu.Lock()
	in.stopTimersLocked()
	p.unidleLocked(in)
	wasStarting := in.state == stateStarting
	in.state = stateDead
	in.setBackLocked(false)
	delete(p.all, in)
	a := in.cur
	in.cur = nil
	var failure error
	if a != nil && !a.finished {
		failure = in.failureLocked(a, wasStarting, err)
	}
	doomed, pid, life := in.doomed, in.pid, time.Since(in.started)
	p.roomLocked() // before the attempt ends: whoever learns of its end finds room
	p.mu.Unlock()
	if doomed != nil {
		err = doomed
	}
	p.log.Debug("instance ended", "pid", pid, "after", life, "reason", err)
	if failure != nil {
		in.finish(a, nil, failure)
	}
	if in.out != nil {
		in.out.close()
	}
	p.mu.Lock()
	p.event("exit", pid)
	p.mu.Unlock()
}

// failureLocked words the failure of attempt a by the end of its instance.
func (in *instance) failureLocked(a *attempt, starting bool, err error) error {
	p := in.p
	if in.doomed == ErrClosed {
		return ErrClosed
	}
	failure := &FunctionError{Type: TypeExit}
	reason := err
	if doomed, ok := in.doomed.(*FunctionError); ok {
		*failure = *doomed
		reason = nil
	} else if fe, ok := err.(*FunctionError); ok {
		*failure = *fe
		reason = nil
	}
	if oom := in.group.outOfMemory(); oom && failure.Type != TypeMemory {
		failure.Type = TypeMemory
		failure.Message = fmt.Sprintf("instance %d was killed at its memory limit of %d MB", in.pid, p.cfg.MemoryMB)
		reason = nil
	}
	if reason != nil {
		failure.Message = "Runtime exited with error: " + reason.Error()
	} else if failure.Message == "" {
		failure.Message = "Runtime exited without providing a reason"
	}
	if starting && failure.Type == TypeExit {
		failure.Type = TypeInit
		failure.Message += " before it polled for work"
		if in.initErr != nil {
			failure.Message = in.initErr.Error()
			failure.StackTrace = in.initErr.StackTrace
		}
	}
	failure.Message = "RequestId: " + a.inv.RequestID + " Error: " + failure.Message
	if in.out != nil {
		failure.Output = in.out.last(20, 2<<10)
	}
	return failure
}

// run gives an acquired instance its next attempt.
func (in *instance) run(a *attempt) {
	p := in.p
	p.mu.Lock()
	if in.state == stateDead {
		failure := in.failureLocked(a, false, nil)
		p.mu.Unlock()
		in.finish(a, nil, failure)
		return
	}
	a.inv.Instance = in.pid
	in.cur = a
	in.given++
	in.wake <- struct{}{}
	// The deadline is set when the instance takes the event; one that does not take it is stuck.
	in.timer = time.AfterFunc(p.cfg.Timeout, func() { in.expire(a) })
	p.mu.Unlock()
}

// finish ends attempt a with a result or an error, once; whatever comes later is dropped.
func (in *instance) finish(a *attempt, body []byte, err error) bool {
	p := in.p
	tail := in.printed()
	resident, peak := in.group.memory(in.pid)
	p.mu.Lock()
	if a.finished {
		p.mu.Unlock()
		return false
	}
	a.finished = true
	in.setBackLocked(in.state == stateBusy)
	in.resident, in.peak = cmp.Or(resident, in.resident), max(in.peak, peak)
	now := time.Now()
	switch {
	case !a.delivered.IsZero():
		a.inv.Duration = now.Sub(a.delivered)
	case a.inv.Cold:
		a.inv.Init = now.Sub(in.started)
	}
	a.inv.PeakMemoryMB = megabytes(in.peak)
	inv := a.inv
	p.mu.Unlock()
	p.meter(&inv, err)
	a.done <- outcome{body: body, inv: inv, err: err, tail: tail}
	return true
}

// printed returns what the instance has printed since its last attempt began.
func (in *instance) printed() []byte {
	if in.out == nil {
		return nil
	}
	return in.out.sinceMark()
}

// expire kills an instance that has used up the time of attempt a, or of its start if a is nil.
func (in *instance) expire(a *attempt) {
	p := in.p
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case a == nil && in.state == stateStarting:
		in.killLocked(&FunctionError{Type: TypeInit, Message: fmt.Sprintf("the instance did not poll for work within %.2f seconds of its start", p.cfg.InitTimeout.Seconds())})
	case a != nil && in.cur == a:
		in.killLocked(&FunctionError{Type: TypeTimeout, Message: fmt.Sprintf("Task timed out after %.2f seconds", p.cfg.Timeout.Seconds())})
	}
}

// reap kills an instance that has been idle for too long.
func (in *instance) reap() {
	p := in.p
	p.mu.Lock()
	defer p.mu.Unlock()
	if in.state == stateIdle && p.unidleLocked(in) {
		p.event("reap", in.pid)
		in.killLocked(errIdle)
	}
}

var errIdle = fmt.Errorf("idle for too long")

// killLocked kills the process group; the first reason given is the one that counts.
func (in *instance) killLocked(reason error) {
	if in.doomed == nil {
		in.doomed = reason
	}
	in.p.unidleLocked(in)
	if in.pid != 0 {
		in.group.kill()
	}
}

// takeLocked makes an idle instance a busy one.
func (in *instance) takeLocked() {
	in.state = stateBusy
	if in.reaper != nil {
		in.reaper.Stop()
		in.reaper = nil
	}
}

// setBackLocked says whether the instance has answered and is about to poll.
func (in *instance) setBackLocked(back bool) {
	if in.back == back {
		return
	}
	in.back = back
	if back {
		in.p.returning++
	} else {
		in.p.returning--
	}
}

func (in *instance) stopTimersLocked() {
	for _, t := range []**time.Timer{&in.timer, &in.reaper} {
		if *t != nil {
			(*t).Stop()
			*t = nil
		}
	}
}

// watchMemory looks at the resident memory of the instance until it ends and kills it at twice its limit. Twice,
// because pages of the executable count too, and because a garbage collector passes its goal for a moment.
func (in *instance) watchMemory() {
	p := in.p
	if !canReadMemory {
		return
	}
	timer := time.NewTimer(memoryInterval)
	defer timer.Stop()
	for {
		select {
		case <-in.gone:
			return
		case <-timer.C:
		}
		resident, peak := in.group.memory(in.pid)
		p.mu.Lock()
		in.resident, in.peak = cmp.Or(resident, in.resident), max(in.peak, peak)
		if limit := 2 * int64(p.cfg.MemoryMB) << 20; resident > limit && in.doomed == nil {
			in.killLocked(&FunctionError{Type: TypeMemory, Message: fmt.Sprintf(
				"instance %d was killed with %d MB resident, over twice its limit of %d MB", in.pid, megabytes(resident), p.cfg.MemoryMB)})
			p.log.Warn("instance killed for its memory", "pid", in.pid, "resident_mb", megabytes(resident), "limit_mb", p.cfg.MemoryMB)
		}
		p.mu.Unlock()
		timer.Reset(nextLook(resident, int64(p.cfg.MemoryMB)<<20))
	}
}

// nextLook is how long an instance's memory may go unwatched: an instance far
// below its limit takes a while to reach it, and looking costs system calls.
func nextLook(resident, limit int64) time.Duration {
	if resident < limit/2 {
		return 5 * memoryInterval
	}
	return memoryInterval
}

func megabytes(bytes int64) int { return int((bytes + 1<<20 - 1) >> 20) }
