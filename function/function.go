// Package function runs functions on this machine under the contract of AWS Lambda: each instance is an ordinary
// process that asks the Lambda Runtime API for its next invocation, so a binary that runs here moves to Lambda unchanged.
//
// Call [New] with a [Config] first, then [Platform.Invoke] from as many goroutines as there is work, and [Platform.Close]
// at the end. [Platform.InvokeHandler] offers the same platform to the AWS SDKs and command line, [Serve] serves it.
//
// What it promises:
//
//   - Never more than Config.Concurrency processes. Callers beyond that wait in the order they came.
//   - An instance has one invocation at a time and is free again only when it polls for the next one. The instance
//     used last is used first, so that surplus ones grow idle and are reaped.
//   - No invocation outlives its timeout, no instance its platform: instances are killed with their whole process
//     group. On Linux and Windows the kernel kills them also when the peer itself is killed.
//   - A crash, a timeout, a failed start and a failing handler are retried with exponential back-off and full jitter,
//     all but errors whose type begins with "Permanent". So a function may run more than once for one Invoke, also after
//     it has done all its work: what it writes has to be idempotent.
//   - Every attempt is metered, those that fail too, and those whose caller has left.
//
// Limits: payloads and results of 6 MB, as on Lambda; no response streaming, no extensions, no X-Ray. On Linux instances
// are kept from the files, memory and connections of others ([Isolation]); elsewhere they are not. The memory limit is kept
// by cgroup v2 where this process may create groups, else on Linux by watching resident memory; elsewhere it is not kept.
package function

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"time"
)

// Limits of Lambda that hold here too.
const (
	MaxPayload      = 6 << 20     // bytes of an event
	MaxAsyncPayload = 1 << 20     // bytes of an event that nobody waits for
	MaxResponse     = 6<<20 + 100 // bytes of a result
	maxErrorBody    = 256 << 10   // bytes kept of an error a function reports
	maxConcurrency  = 10_000      // instances of one platform
	maxMemoryMB     = 1 << 20     // a tebibyte
	maxTimeout      = 24 * time.Hour
	maxRetries      = 100
)

// ErrClosed is returned by Invoke when the platform is closed before the invocation ended.
var ErrClosed = errors.New("function platform is closed")

// Config says what to run and within which limits.
type Config struct {
	Name        string        // function name: letters, digits, - and _; empty: "function"
	Command     []string      // executable and arguments; [Self] is this program itself
	Env         []string      // KEY=VALUE on top of Lambda's variables and the few that are inherited; the last of a key wins
	Dir         string        // working folder; empty: this process's own
	Concurrency int           // instances at most; 0: one for each CPU
	MemoryMB    int           // what is metered and the limit of an instance; 0: 1024
	Timeout     time.Duration // of one attempt; 0: 1 minute
	InitTimeout time.Duration // from start of a process to its first poll; 0: 10 seconds
	IdleTimeout time.Duration // an instance idle for so long is reaped; 0: 5 minutes, negative: never
	Retries     int           // attempts after the first; 0: 2, negative: none
	RetryBase   time.Duration // longest first back-off, doubled for each further one; 0: 50 ms
	RetryMax    time.Duration // longest back-off; 0: 2 seconds
	Isolation   Isolation     // what instances may touch; zero: as little as they can live with
	Logger      *slog.Logger  // receives what instances print, and their starts and ends; nil: nothing is logged

	// OnInvocation is called once for each attempt, when it has ended, from several goroutines at once; it must not
	// block or call the platform. Nil: nobody is told.
	OnInvocation func(Invocation)
}

// Self is the Command that runs this program again. On Linux it works also when its file was deleted or replaced
// meanwhile, as `go run` does.
func Self() string {
	if runtime.GOOS == "linux" {
		return "/proc/self/exe"
	}
	if path, err := os.Executable(); err == nil {
		return path
	}
	return os.Args[0]
}

func (c Config) withDefaults() Config {
	set := func(d *time.Duration, zero time.Duration) {
		if *d == 0 {
			*d = zero
		}
	}
	if c.Name == "" {
		c.Name = "function"
	}
	if c.Concurrency == 0 {
		c.Concurrency = runtime.NumCPU()
	}
	if c.MemoryMB == 0 {
		c.MemoryMB = 1024
	}
	set(&c.Timeout, time.Minute)
	set(&c.InitTimeout, 10*time.Second)
	set(&c.IdleTimeout, 5*time.Minute)
	set(&c.RetryBase, 50*time.Millisecond)
	set(&c.RetryMax, 2*time.Second)
	switch {
	case c.Retries == 0:
		c.Retries = 2
	case c.Retries < 0:
		c.Retries = 0
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

func (c Config) validate() error {
	if len(c.Name) > 64 || strings.Trim(c.Name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") != "" {
		return fmt.Errorf("function name %q: use up to 64 letters, digits, - and _", c.Name)
	}
	if len(c.Command) == 0 || c.Command[0] == "" {
		return fmt.Errorf("function %q has no command: set Command to an executable and its arguments", c.Name)
	}
	if _, err := exec.LookPath(c.Command[0]); err != nil {
		return fmt.Errorf("function %q: %w: give the path of an executable", c.Name, err)
	}
	if c.Dir != "" {
		if info, err := os.Stat(c.Dir); err != nil {
			return fmt.Errorf("function %q: working folder: %w", c.Name, err)
		} else if !info.IsDir() {
			return fmt.Errorf("function %q: working folder %q is not a folder", c.Name, c.Dir)
		}
	}
	for _, kv := range c.Env {
		if strings.IndexByte(kv, '=') < 1 || strings.IndexByte(kv, 0) >= 0 {
			return fmt.Errorf("function %q: environment entry %.40q is not KEY=VALUE", c.Name, kv)
		}
	}
	inRange := func(what string, v, lo, hi int64) error {
		if v < lo || v > hi {
			return fmt.Errorf("function %q: %s of %d is not within %d to %d", c.Name, what, v, lo, hi)
		}
		return nil
	}
	return errors.Join(
		inRange("concurrency", int64(c.Concurrency), 1, maxConcurrency),
		inRange("memory in MB", int64(c.MemoryMB), 1, maxMemoryMB),
		inRange("timeout in ms", c.Timeout.Milliseconds(), 1, maxTimeout.Milliseconds()),
		inRange("init timeout in ms", c.InitTimeout.Milliseconds(), 1, maxTimeout.Milliseconds()),
		inRange("retries", int64(c.Retries), 0, maxRetries),
		inRange("first back-off in ms", c.RetryBase.Milliseconds(), 0, maxTimeout.Milliseconds()),
		inRange("longest back-off in ms", c.RetryMax.Milliseconds(), 0, maxTimeout.Milliseconds()))
}

// Platform runs the instances of one function. All methods may be called from many goroutines.
type Platform struct {
	cfg    Config
	log    *slog.Logger
	memory *memoryGroups

	closing  chan struct{}  // closed when Close begins
	isolator *isolator      // nil: instances may do what this process's user may
	owned    sync.WaitGroup // instances and invocations that nobody waits for; added to under mu while not closed
	once     sync.Once      // of Close

	mu        sync.Mutex // guards what follows and the fields of instances that say so
	closed    bool
	idle      []*instance            // polling for work; the one used last is at the end
	all       map[*instance]struct{} // every instance whose process may live
	slots     int                    // instances that exist or are about to; at most cfg.Concurrency
	returning int                    // instances that have answered and not polled again yet
	waiters   []*waiter              // in order of arrival
	async     int                    // invocations accepted that nobody waits for
	stats     Stats

	onEvent func(event string, pid int) // tests wait on "wait", "start", "idle", "reap", "exit"; else nil
}

// New checks c and makes a platform. No process is started before the first invocation.
func New(c Config) (*Platform, error) {
	c = c.withDefaults()
	if err := c.validate(); err != nil {
		return nil, err
	}
	p := &Platform{
		cfg:     c,
		log:     c.Logger.With("function", c.Name),
		closing: make(chan struct{}),
		all:     make(map[*instance]struct{}),
	}
	if !c.Isolation.Off {
		var err error
		if p.isolator, err = newIsolator(c); err != nil && !errors.Is(err, errNotIsolated) {
			return nil, fmt.Errorf("function %q: %w", c.Name, err)
		}
		if err != nil {
			p.log.Warn("functions are not isolated: they can read what this user can, keys too; run only functions that you trust", "reason", err)
		}
		p.log.Debug("functions are isolated", "by", p.Isolation())
	}
	p.memory = newMemoryGroups(c.MemoryMB, p.log)
	return p, nil
}

// Isolation says what keeps instances from what is not theirs: "users of their own", "Landlock 7", both, or "none".
func (p *Platform) Isolation() string {
	if p.isolator == nil {
		return "none"
	}
	return p.isolator.String()
}

// Close kills every instance with its process group, ends the invocations that run or wait with ErrClosed, and returns
// when all of them are gone.
func (p *Platform) Close() error {
	p.once.Do(func() {
		p.mu.Lock()
		p.closed = true
		waiters := p.waiters
		p.waiters = nil
		for in := range p.all {
			in.killLocked(ErrClosed)
		}
		p.mu.Unlock()
		close(p.closing)
		for _, w := range waiters {
			w.grant <- grant{err: ErrClosed}
		}
		p.owned.Wait()
		p.memory.close()
		if p.isolator != nil {
			p.isolator.close()
		}
	})
	return nil
}

// Invoke runs the function once on payload, a JSON document, and returns its result, which is the caller's. It waits for
// a free instance or starts one, and retries as the package comment says. The Invocation is that of the last attempt.
// A failure of the function or its instance is a *[FunctionError]. When ctx ends, Invoke returns at once with its error;
// an attempt that runs by then goes on to its own end, as it does on Lambda, and is metered.
func (p *Platform) Invoke(ctx context.Context, payload []byte) ([]byte, Invocation, error) {
	out := p.invoke(ctx, newRequestID(), payload, p.cfg.Retries, true)
	return out.body, out.inv, out.err
}

// outcome is what became of an attempt, and of the invocation when it is the last attempt.
type outcome struct {
	body []byte
	inv  Invocation
	err  error
	tail []byte // what the instance printed during the attempt
}

// invoke makes up to 1+retries attempts. Without wait it returns errThrottled where it would have to wait for an instance.
func (p *Platform) invoke(ctx context.Context, id string, payload []byte, retries int, wait bool) outcome {
	if len(payload) > MaxPayload {
		return outcome{err: fmt.Errorf("invoking %s: event of %d bytes is over the limit of %d: pass keys, not tensors", p.cfg.Name, len(payload), MaxPayload)}
	}
	payload = bytes.Clone(payload) // an abandoned attempt may still be delivering it
	for attempt := 1; ; attempt++ {
		out := p.attempt(ctx, id, attempt, payload, wait)
		var failed *FunctionError
		if out.err == nil || !errors.As(out.err, &failed) {
			return out
		}
		if failed.Permanent() || attempt > retries {
			if attempt > 1 {
				out.err = fmt.Errorf("attempt %d of %d: %w", attempt, retries+1, out.err)
			}
			return out
		}
		p.count(func(s *Stats) { s.Retries++ })
		backoff := p.backoff(attempt)
		p.log.Warn("retrying", "request", id, "attempt", attempt, "in", backoff, "error", out.err)
		timer := time.NewTimer(backoff)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			out.err = fmt.Errorf("invoking %s: %w after attempt %d failed: %w", p.cfg.Name, context.Cause(ctx), attempt, out.err)
			return out
		case <-p.closing:
			timer.Stop()
			out.err = ErrClosed
			return out
		}
	}
}

// backoff is the pause after the given attempt: uniform from 0 to base*2^(attempt-1), capped ("full jitter").
func (p *Platform) backoff(attempt int) time.Duration {
	limit := p.cfg.RetryMax
	if shift := attempt - 1; shift < 32 {
		if d := p.cfg.RetryBase << shift; d>>shift == p.cfg.RetryBase && d < limit {
			limit = d
		}
	}
	if limit <= 0 {
		return 0
	}
	return rand.N(limit)
}

// attempt runs the function once.
func (p *Platform) attempt(ctx context.Context, id string, number int, payload []byte, wait bool) outcome {
	a := &attempt{
		payload: payload,
		done:    make(chan outcome, 1),
		inv: Invocation{
			Function: p.cfg.Name, RequestID: id, Attempt: number, MemoryMB: p.cfg.MemoryMB, Start: time.Now(), Label: ctx.Value(labelKey{}),
		},
	}
	g := p.acquire(ctx, wait)
	a.inv.Queue = time.Since(a.inv.Start)
	if g.err != nil {
		return outcome{inv: a.inv, err: g.err}
	}
	if g.in == nil {
		p.start(a)
	} else {
		g.in.run(a)
	}
	select {
	case out := <-a.done:
		return out
	case <-ctx.Done():
		select {
		case out := <-a.done: // both at once: the result counts
			return out
		default:
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		return outcome{inv: a.inv.abandoned(), err: fmt.Errorf("invoking %s: %w", p.cfg.Name, context.Cause(ctx))}
	}
}
