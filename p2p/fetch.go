package p2p

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/spirt-ml/spirt/internal/treehash"
)

const (
	fetchWindow  = 32 // chunks asked for ahead of one source
	fetchTick    = 100 * time.Millisecond
	firstStall   = 500 * time.Millisecond // without a chunk before another source is tried
	retryMin     = 50 * time.Millisecond
	retryMax     = time.Second
	maxSources   = 64
	parallelFrom = 16 // chunks; smaller bodies come from one source at a time
)

// errLie marks bytes that are not what their hash says.
var errLie = errors.New("what it sent does not have the hash asked for")

// Fetch returns the body of that hash and size, as FetchInto gets it.
func (h *Host) Fetch(ctx context.Context, hash treehash.Hash, size int64, from []int) ([]byte, error) {
	if size < 0 || size > min(h.cfg.Limits.BodySize, math.MaxInt) {
		return nil, fmt.Errorf("p2p: fetching %s: a body of %d bytes: want 0 to %d", hash.Short(), size, h.cfg.Limits.BodySize)
	}
	data := make([]byte, size)
	if err := h.FetchInto(ctx, data, hash, from); err != nil {
		return nil, err
	}
	return data, nil
}

// FetchInto fills dst with the body that has this hash and dst's length, from
// any of the members given, the first ones first: large bodies from several at
// once, and chunks from another where one fails, lies, stalls or does not have
// it. It tries until ctx ends (without a deadline: for Limits.Fetch), or until
// every member lied. Every chunk is checked when it arrives. After an error
// dst holds anything.
func (h *Host) FetchInto(ctx context.Context, dst []byte, hash treehash.Hash, from []int) error {
	size := int64(len(dst))
	switch {
	case size > h.cfg.Limits.BodySize:
		return fmt.Errorf("p2p: fetching %s: a body of %d bytes: want 0 to %d", hash.Short(), size, h.cfg.Limits.BodySize)
	case size == 0 && hash == treehash.Sum(nil):
		return nil
	case size == 0:
		return fmt.Errorf("p2p: fetching %s: that is not the hash of no bytes", hash.Short())
	case len(from) == 0 || len(from) > maxSources:
		return fmt.Errorf("p2p: fetching %s: from %d members: want 1 to %d", hash.Short(), len(from), maxSources)
	}
	seen := make(map[int]bool, len(from))
	f := &fetch{h: h, hash: hash, size: size, chunks: treehash.NumChunks(size), done: make(chan outcome, len(from))}
	for _, i := range from {
		m, err := h.other(i)
		if err != nil {
			return fmt.Errorf("p2p: fetching %s: %w", hash.Short(), err)
		}
		if !seen[i] {
			seen[i] = true
			f.sources = append(f.sources, &source{member: m})
		}
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, h.cfg.Limits.Fetch)
		defer cancel()
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	f.data = dst
	f.left = f.chunks
	if err := f.run(ctx); err != nil {
		return fmt.Errorf("p2p: fetching %s, %d bytes: %w", hash.Short(), size, err)
	}
	if f.leaves != nil {
		h.bodies.leavesOf(hash, size, func() []treehash.Hash { return f.leaves })
	}
	return nil
}

// fetch is one Fetch that runs. Its own goroutine starts and stops workers, one
// for each source in use; a chunk is written by the one worker it was given to.
type fetch struct {
	h       *Host
	hash    treehash.Hash
	size    int64
	chunks  int
	data    []byte
	sources []*source
	done    chan outcome
	active  int

	mu       sync.Mutex
	leaves   []treehash.Hash // nil until a manifest came; stays nil for one chunk
	next     int             // chunks from here on were not given out yet
	returned []run           // given out and not delivered
	left     int             // chunks not delivered
}

// source is a member that is asked. Fields below the line belong to the
// fetch's goroutine.
type source struct {
	member *member
	mu     sync.Mutex
	moved  time.Time // when it last delivered something, or was started

	// ----
	cancel context.CancelFunc // not nil while it runs
	failed int
	notNow time.Time // before which it is not tried again
	liar   bool
	err    error // why it failed last
}

func (s *source) move() {
	s.mu.Lock()
	s.moved = time.Now()
	s.mu.Unlock()
}

func (s *source) stalled() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Since(s.moved)
}

// run is a number of consecutive chunks.
type run struct{ first, count int }

type outcome struct {
	source *source
	err    error // nil: there was nothing left to give it
}

func (f *fetch) run(ctx context.Context) error {
	tick := time.NewTicker(fetchTick)
	defer tick.Stop()
	stall := firstStall
	for {
		f.plan(ctx, &stall)
		if f.active == 0 && f.allLied() {
			return f.failure(errors.New("every member sent something else"))
		}
		select {
		case o := <-f.done:
			f.finished(o)
			if f.complete() {
				f.drain()
				return nil
			}
		case <-tick.C:
		case <-ctx.Done():
			f.drain()
			if f.complete() {
				return nil
			}
			return f.failure(ctx.Err())
		case <-f.h.stop:
			f.drain()
			return errClosed
		}
	}
}

// drain stops the workers and waits until none writes to the body any more.
func (f *fetch) drain() {
	for _, s := range f.sources {
		if s.cancel != nil {
			s.cancel()
		}
	}
	for f.active > 0 {
		f.finished(<-f.done)
	}
}

func (f *fetch) finished(o outcome) {
	f.active--
	s := o.source
	s.cancel()
	s.cancel = nil
	if o.err == nil {
		return
	}
	s.err = o.err
	s.failed++
	s.notNow = time.Now().Add(min(retryMax, retryMin<<min(s.failed-1, 10)))
	if errors.Is(o.err, errLie) {
		s.liar = true
		f.h.counts.badBodies.Add(1)
		f.h.blame(s.member, "a false chunk or manifest")
	}
}

func (f *fetch) complete() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.left == 0
}

func (f *fetch) allLied() bool {
	for _, s := range f.sources {
		if !s.liar {
			return false
		}
	}
	return true
}

// failure says what became of every source.
func (f *fetch) failure(cause error) error {
	var why []string
	for _, s := range f.sources {
		if s.err != nil {
			why = append(why, fmt.Sprintf("member %d: %v", s.member.index, s.err))
		}
	}
	if len(why) == 0 {
		return cause
	}
	return fmt.Errorf("%w (%s)", cause, strings.Join(why, "; "))
}

// plan starts a source where there is work that nobody does, and stops one
// that holds the last chunks and does not deliver them.
func (f *fetch) plan(ctx context.Context, stall *time.Duration) {
	f.mu.Lock()
	open := f.next < f.chunks || len(f.returned) > 0
	planned := f.leaves != nil || f.chunks == 1
	f.mu.Unlock()
	target := 1
	if planned && f.chunks >= parallelFrom {
		target = f.h.cfg.Limits.Sources
	}
	var slowest *source
	for _, s := range f.sources {
		if s.cancel != nil && s.stalled() > *stall && (slowest == nil || s.stalled() > slowest.stalled()) {
			slowest = s
		}
	}
	switch {
	case open:
		for f.active < target && f.startBest(ctx) {
		}
		if slowest != nil && f.active < f.h.cfg.Limits.Sources+target && f.startBest(ctx) {
			*stall *= 2
		}
	case slowest != nil && f.best() != nil:
		// What it held goes back, and is given to another at the next plan.
		// Twice the patience next time, so that a slow network is not mistaken
		// for a stalled peer for ever.
		*stall *= 2
		slowest.cancel()
	}
}

// best returns the source to try next: the fewest failures, then the order
// that the caller gave; nil if none may be tried now.
func (f *fetch) best() *source {
	free := make([]*source, 0, len(f.sources))
	now := time.Now()
	for _, s := range f.sources {
		if s.cancel == nil && !s.liar && !now.Before(s.notNow) {
			free = append(free, s)
		}
	}
	if len(free) == 0 {
		return nil
	}
	sort.SliceStable(free, func(i, j int) bool { return free[i].failed < free[j].failed })
	return free[0]
}

func (f *fetch) startBest(ctx context.Context) bool {
	s := f.best()
	if s == nil {
		return false
	}
	wctx, cancel := context.WithCancel(ctx)
	started := f.h.spawn(func() {
		stream, err := f.work(wctx, s)
		f.done <- outcome{s, err}
		if stream == nil {
			return
		}
		if err != nil {
			stream.Reset()
		} else {
			stream.Close()
		}
	})
	if !started {
		cancel()
		return false
	}
	s.cancel = cancel
	s.move()
	f.active++
	return true
}

// give hands out at most n chunks.
func (f *fetch) give(n int) (run, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if last := len(f.returned) - 1; last >= 0 {
		r := &f.returned[last]
		out := run{r.first, min(n, r.count)}
		r.first += out.count
		if r.count -= out.count; r.count == 0 {
			f.returned = f.returned[:last]
		}
		return out, true
	}
	out := run{f.next, min(n, f.chunks-f.next)}
	f.next += out.count
	return out, out.count > 0
}

func (f *fetch) takeBack(runs []run) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range runs {
		if r.count > 0 {
			f.returned = append(f.returned, r)
		}
	}
}

func (f *fetch) chunk(i int) []byte {
	lo := int64(i) * treehash.ChunkSize
	return f.data[lo:min(f.size, lo+treehash.ChunkSize)]
}

// work fetches chunks from one source until there is none to be given out. The
// stream, if there is one, is for the caller to end.
func (f *fetch) work(ctx context.Context, s *source) (network.Stream, error) {
	sess, err := f.h.sessionFor(ctx, s.member)
	if err != nil {
		return nil, err
	}
	stream, err := sess.conn.NewStream(ctx)
	if err != nil {
		return nil, fmt.Errorf("opening a stream: %w", err)
	}
	if err := stream.SetProtocol(bodyProtocol); err != nil {
		return stream, fmt.Errorf("opening a stream: %w", err)
	}
	// Reads and writes end with ctx. io sets deadlines only while ctx goes on.
	defer context.AfterFunc(ctx, func() { stream.SetDeadline(time.Unix(1, 0)) })()
	w := &worker{f: f, source: s, session: sess, stream: stream, head: openerHead(bodyProtocol)}
	err = w.work(ctx)
	f.takeBack(w.pending)
	if ctx.Err() != nil && err != nil {
		err = errors.New("it delivered nothing for too long")
	}
	return stream, err
}

// worker is one stream to one source.
type worker struct {
	f       *fetch
	source  *source
	session *session
	stream  network.Stream
	head    []byte // goes out with the first request
	greeted bool
	pending []run // asked for and not here, in the order of the answers
}

func (w *worker) work(ctx context.Context) error {
	f := w.f
	f.mu.Lock()
	planned := f.leaves != nil || f.chunks == 1
	f.mu.Unlock()
	if !planned {
		if err := w.manifest(ctx); err != nil {
			return err
		}
	}
	window := fetchWindow
	if n := len(f.sources); n > 1 {
		// The smaller the runs, the less waits for the slowest source.
		window = max(4, min(fetchWindow, f.chunks/(2*n)))
	}
	asked := 0
	for {
		for asked <= window/2 {
			r, ok := f.give((window + 1) / 2)
			if !ok {
				break
			}
			w.pending = append(w.pending, r)
			asked += r.count
			if err := w.ask(ctx, request{hash: f.hash, size: f.size, kind: wantChunks, first: r.first, count: r.count}); err != nil {
				return err
			}
		}
		if len(w.pending) == 0 {
			return nil
		}
		// The answer to one request: a status, then its chunks.
		if err := w.status(ctx); err != nil {
			return err
		}
		for r := &w.pending[0]; r.count > 0; {
			c := f.chunk(r.first)
			if err := w.read(ctx, c); err != nil {
				return err
			}
			if !f.right(r.first, c) {
				return fmt.Errorf("chunk %d: %w", r.first, errLie)
			}
			r.first++
			r.count--
			asked--
			w.source.move()
			f.mu.Lock()
			f.left--
			f.mu.Unlock()
		}
		w.pending = w.pending[1:]
	}
}

// right reports whether c is chunk i of the body.
func (f *fetch) right(i int, c []byte) bool {
	leaf := treehash.Leaf(i, c)
	if f.chunks == 1 {
		return treehash.Root(f.size, []treehash.Hash{leaf}) == f.hash
	}
	return leaf == f.leaves[i]
}

func (w *worker) manifest(ctx context.Context) error {
	f := w.f
	if err := w.ask(ctx, request{hash: f.hash, size: f.size, kind: wantManifest}); err != nil {
		return err
	}
	if err := w.status(ctx); err != nil {
		return err
	}
	leaves := make([]treehash.Hash, f.chunks)
	flat := make([]byte, f.chunks*len(treehash.Hash{}))
	if err := w.read(ctx, flat); err != nil {
		return err
	}
	for i := range leaves {
		copy(leaves[i][:], flat[i*len(leaves[i]):])
	}
	if treehash.Root(f.size, leaves) != f.hash {
		return fmt.Errorf("manifest: %w", errLie)
	}
	w.source.move()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.leaves == nil {
		f.leaves = leaves
	}
	return nil
}

func (w *worker) ask(ctx context.Context, r request) error {
	if err := w.deadline(ctx, w.stream.SetWriteDeadline); err != nil {
		return err
	}
	_, err := w.stream.Write(r.append(w.head))
	w.head = nil
	if err != nil {
		return fmt.Errorf("asking: %w", err)
	}
	return nil
}

func (w *worker) status(ctx context.Context) error {
	var b [1]byte
	if !w.greeted {
		if err := w.deadline(ctx, w.stream.SetReadDeadline); err != nil {
			return err
		}
		if err := readHead(w.stream, bodyProtocol); err != nil {
			return err
		}
		w.greeted = true
	}
	if err := w.read(ctx, b[:]); err != nil {
		return err
	}
	switch b[0] {
	case statusOK:
		return nil
	case statusAbsent:
		return errors.New("it does not have it")
	case statusBusy:
		return errors.New("it is busy")
	case statusRefused:
		return errors.New("it refused the request")
	}
	return fmt.Errorf("status %d: %w", b[0], errLie)
}

// read fills b within the time for one chunk. What arrives also shows that the
// member lives: on a slow link its heartbeats queue behind its chunks.
func (w *worker) read(ctx context.Context, b []byte) error {
	if err := w.deadline(ctx, w.stream.SetReadDeadline); err != nil {
		return err
	}
	for n := 0; n < len(b); {
		k, err := w.stream.Read(b[n:])
		n += k
		w.f.h.counts.bodyIn.Add(uint64(k))
		w.session.heard.Store(int64(w.f.h.now()))
		if err != nil && n < len(b) {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("reading: %w", err)
		}
	}
	return nil
}

// deadline sets one, unless ctx has ended: then the one in the past stays.
func (w *worker) deadline(ctx context.Context, set func(time.Time) error) error {
	limit := w.f.h.cfg.Limits.Chunk
	if err := set(time.Now().Add(limit + rand.N(limit/8+1))); err != nil {
		return err
	}
	return ctx.Err()
}
