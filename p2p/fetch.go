package p2p

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	manet "github.com/multiformats/go-multiaddr/net"

	"github.com/spirt-ml/spirt/internal/treehash"
)

const (
	fetchTick  = 100 * time.Millisecond
	firstStall = 500 * time.Millisecond // without progress before another source is tried
	progress   = 16 << 10               // bytes that count as such
	retryMin   = 50 * time.Millisecond
	retryMax   = time.Second
	absentTime = 500 * time.Millisecond // after which Resume believes that nobody has the body
	maxSources = 64
	// swarmFrom is the number of chunks from which on a body is fetched from
	// several members at once, and served while it is fetched. Smaller ones come
	// from one source at a time.
	swarmFrom = 16
	// chooseFrom bounds how many chunks are looked at to choose one.
	chooseFrom = 1 << 13
)

var (
	// errLie marks bytes that are not what their hash says.
	errLie    = errors.New("what it sent does not have the hash asked for")
	errAbsent = errors.New("it does not have it")
	errNobody = errors.New("no connected member has it")
	errSilent = errors.New("nothing came")
)

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
// any of the members given, at most 64, the first ones first: large bodies from
// several at once, and chunks from another where one fails, lies, stalls or
// does not have it. Members may be named that are still fetching it themselves:
// they serve what they have, and so does this peer while it fetches. It tries
// until ctx ends (without a deadline: for Limits.Fetch), or until every member
// lied. Every chunk is checked when it arrives. After an error dst holds the
// chunks that came, and Resume goes on from there.
func (h *Host) FetchInto(ctx context.Context, dst []byte, hash treehash.Hash, from []int) error {
	return h.fetch(ctx, &fetch{data: dst, hash: hash}, from)
}

// Resume is FetchInto for a dst that may hold chunks of the body already, those
// of a FetchInto that failed or of a file: whichever are right are not fetched.
// It ends before ctx where nothing has come for patience, or where every
// connected member says that it does not have the body, and goes on saying so
// for a moment.
func (h *Host) Resume(ctx context.Context, dst []byte, hash treehash.Hash, from []int, patience time.Duration) error {
	return h.fetch(ctx, &fetch{data: dst, hash: hash, resume: true, patience: patience}, from)
}

// fetch runs f, of which only what its caller wants is set.
func (h *Host) fetch(ctx context.Context, f *fetch, from []int) error {
	hash, dst := f.hash, f.data
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
	chunks := treehash.NumChunks(size)
	f.h, f.size, f.chunks = h, size, chunks
	f.done, f.wake = make(chan outcome, len(from)), make(chan struct{}, 1)
	f.wanted, f.open, f.left = newBitset(chunks-1), chunks, chunks
	f.copies, f.workers = make([]uint8, chunks), make(map[*worker]struct{})
	for i := range chunks {
		f.wanted.set(i)
	}
	var seen []int
	before := 0
	for _, i := range from {
		m, err := h.other(i)
		if err != nil {
			return fmt.Errorf("p2p: fetching %s: %w", hash.Short(), err)
		}
		if slices.Contains(seen, i) {
			continue
		}
		if len(seen) > 0 && i < h.self.index {
			before++
		}
		seen = append(seen, i)
		f.sources = append(f.sources, &source{member: m, first: len(seen) == 1})
	}
	// Those who fetch at the same time each begin elsewhere, and have something
	// to trade.
	f.start = int(int64(chunks) * int64(before) / int64(len(seen)))
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, h.cfg.Limits.Fetch)
		defer cancel()
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if f.resume && chunks == 1 && f.right(0, dst) {
		return nil
	}
	err := f.run(ctx)
	if f.part != nil {
		h.bodies.end(hash, f.part)
	}
	if err != nil {
		return fmt.Errorf("p2p: fetching %s, %d bytes: %w", hash.Short(), size, err)
	}
	if f.leaves != nil {
		h.bodies.leavesOf(hash, size, func() []treehash.Hash { return f.leaves })
	}
	return nil
}

// fetch is one Fetch that runs. Its own goroutine starts and stops workers, one
// for each source in use; a chunk is written by the one worker that it was
// given to.
type fetch struct {
	h       *Host
	hash    treehash.Hash
	size    int64
	chunks  int
	data    []byte
	start   int // the chunk that it begins with; the order goes round
	sources []*source
	done    chan outcome
	wake    chan struct{} // tells the fetch's goroutine that something changed
	active  int

	resume   bool
	patience time.Duration // without anything coming; 0: until ctx ends
	came     atomic.Int64  // when something came last, or the fetch began, by the host's clock

	mu      sync.Mutex
	leaves  []treehash.Hash // nil until a manifest came; stays nil for one chunk
	part    *part           // what is offered to others; nil for nothing
	wanted  bitset          // chunks that are not here and were not given out
	open    int             // their number
	left    int             // chunks that are not here
	low     int             // places in the order before it hold no wanted chunk
	traded  time.Time       // when a chunk came from another than the first source
	workers map[*worker]struct{}
	copies  []uint8 // for each chunk, the sources in use known to have it, but for the first source
}

// source is a member that is asked. Fields below the line belong to the
// fetch's goroutine.
type source struct {
	member *member
	first  bool // of those that the caller named: the one that many others ask
	mu     sync.Mutex
	moved  time.Time // when it last delivered something, or was started
	idle   bool      // it was only asked what it has

	// ----
	cancel context.CancelFunc // not nil while it runs
	failed int
	notNow time.Time // before which it is not tried again
	liar   bool
	err    error // why it failed last
}

func (s *source) move() { s.rest(false) }

// rest is move; an idle source may be silent for holdTime.
func (s *source) rest(idle bool) {
	s.mu.Lock()
	s.moved, s.idle = time.Now(), idle
	s.mu.Unlock()
}

func (s *source) stalled() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.idle {
		return time.Since(s.moved) - holdTime
	}
	return time.Since(s.moved)
}

type outcome struct {
	source *source
	err    error // nil: there was nothing left to give it
}

func (f *fetch) run(ctx context.Context) error {
	tick := time.NewTicker(fetchTick)
	defer tick.Stop()
	stall := firstStall
	f.move()
	for {
		f.plan(ctx, &stall)
		if f.active == 0 && f.allLied() {
			return f.failure(errors.New("every member sent something else"))
		}
		if err := f.hopeless(); err != nil {
			f.drain()
			if f.complete() { // the last chunk came meanwhile
				return nil
			}
			return f.failure(err)
		}
		select {
		case o := <-f.done:
			f.finished(o)
			if f.complete() {
				f.drain()
				return nil
			}
		case <-f.wake:
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

func (f *fetch) move() { f.came.Store(int64(f.h.now())) }

// hopeless says why it is of no use to go on, if so.
func (f *fetch) hopeless() error {
	silent := f.h.now() - time.Duration(f.came.Load())
	if f.patience == 0 || silent < min(absentTime, f.patience) {
		return nil
	}
	if silent >= f.patience {
		return fmt.Errorf("%w for %v", errSilent, f.patience)
	}
	asked := 0
	f.h.mu.Lock()
	defer f.h.mu.Unlock()
	for _, s := range f.sources {
		if s.member.session() == nil {
			continue
		}
		if !errors.Is(s.err, errAbsent) {
			return nil
		}
		asked++
	}
	if asked == 0 {
		return nil // somebody may connect
	}
	return errNobody
}

// changed makes run look at once.
func (f *fetch) changed() {
	select {
	case f.wake <- struct{}{}:
	default:
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
	open := f.open > 0
	planned := f.planned()
	f.mu.Unlock()
	target := 1
	if planned && f.swarm() {
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

// best returns the source to try next: the fewest failures, then the first
// one, those that are connected, and the order that the caller gave; nil if
// none may be tried now.
func (f *fetch) best() *source {
	free := make([]*source, 0, len(f.sources))
	now := time.Now()
	far := make(map[*source]bool)
	f.h.mu.Lock()
	for _, s := range f.sources {
		far[s] = !s.first && s.member.session() == nil
	}
	f.h.mu.Unlock()
	for _, s := range f.sources {
		if s.cancel == nil && !s.liar && !now.Before(s.notNow) {
			free = append(free, s)
		}
	}
	if len(free) == 0 {
		return nil
	}
	sort.SliceStable(free, func(i, j int) bool {
		a, b := free[i], free[j]
		return a.failed < b.failed || a.failed == b.failed && !far[a] && far[b]
	})
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

// planned reports whether chunks can be asked for. f.mu is held.
func (f *fetch) planned() bool { return f.leaves != nil || f.chunks == 1 }

func (f *fetch) swarm() bool { return f.chunks >= swarmFrom }

// give hands out a chunk that the worker's source has, one that few others
// have. The first source is the one that everybody asks: for what others have
// too, or are about to, since it is their share, it is asked for one chunk at
// a time only, and not (later is true) while the others deliver and are faster
// together.
func (f *fetch) give(w *worker) (chunk int, ok, later bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	best, place := -1, 0
	enough := uint8(1) // itself
	if w.source.first {
		enough = 0
	}
	for p := f.low; p < min(f.chunks, f.low+chooseFrom) && (best < 0 || f.copies[best] > enough); p++ {
		i := (f.start + p) % f.chunks
		switch {
		case !f.wanted.has(i):
			if p == f.low {
				f.low++
			}
		case w.count < f.chunks && !w.has.has(i):
		case best < 0 || f.copies[i] < f.copies[best]:
			best, place = i, p
		}
	}
	if best < 0 {
		return 0, false, false
	}
	if w.source.first && (f.copies[best] > 0 || place >= f.chunks/len(f.sources)) {
		others, speed := false, 0.0
		for o := range f.workers {
			if o != w && o.count > 0 {
				others = true
				speed += o.session.link.speed()
			}
		}
		if others && w.asked > 0 {
			return 0, false, false
		}
		if speed > w.session.link.speed() && time.Since(f.traded) < holdTime {
			return 0, false, true
		}
	}
	f.wanted.clear(best)
	f.open--
	return best, true, false
}

// takeBack takes back chunks that were given out and did not come.
func (f *fetch) takeBack(w *worker) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, a := range w.pending {
		if a.chunk < 0 {
			continue
		}
		f.wanted.set(a.chunk)
		f.open++
		f.low = min(f.low, (a.chunk-f.start+f.chunks)%f.chunks)
	}
	f.countLocked(w, nil)
	delete(f.workers, w)
}

// countLocked replaces what a worker's source is known to have.
func (f *fetch) countLocked(w *worker, has bitset) {
	if !w.source.first {
		for i := range f.copies {
			switch had := w.has.has(i); {
			case had && !has.has(i):
				f.copies[i]--
			case !had && has.has(i):
				f.copies[i]++
			}
		}
	}
	w.has = has
}

// got takes note of a chunk that is in its place.
func (f *fetch) got(i int, from *source) {
	f.move()
	f.mu.Lock()
	defer f.mu.Unlock()
	if !from.first {
		f.traded = time.Now()
	}
	if f.part != nil {
		f.part.add(i)
	}
	if f.left--; f.left == 0 {
		f.changed()
	}
}

func (f *fetch) chunk(i int) []byte { return chunkOf(f.data, i) }

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
	// Reads and writes end with ctx. Workers set deadlines only while ctx goes on.
	defer context.AfterFunc(ctx, func() { stream.SetDeadline(time.Unix(1, 0)) })()
	w := &worker{
		f: f, source: s, session: sess, stream: stream, out: openerHead(bodyProtocol),
		local: manet.IsIPLoopback(sess.conn.RemoteMultiaddr()),
	}
	if !f.swarm() {
		w.count = f.chunks
	}
	f.mu.Lock()
	f.workers[w] = struct{}{}
	f.mu.Unlock()
	err = w.work(ctx)
	sess.link.free(w.asked)
	f.takeBack(w)
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
	local   bool   // the source is on this machine
	out     []byte // requests to be written
	greeted bool
	pending []asked // what answers are awaited to, in their order
	asked   int     // chunks among them
	has     bitset  // what the source said that it has; nil: everything
	count   int     // of that; guarded by f.mu where others read it
	newsDue bool    // it was asked to say so
	came    int     // bytes since it last counted as progress
}

// asked is one request on its way: for a chunk, or for holdings (-1).
type asked struct {
	chunk  int
	packed bool // it may come packed
	at     time.Time
}

func (w *worker) work(ctx context.Context) error {
	f, link := w.f, &w.session.link
	f.mu.Lock()
	planned := f.planned()
	f.mu.Unlock()
	if !planned {
		w.ask(wantManifest, 0)
	}
	if f.swarm() {
		w.askHoldings(0)
	}
	if !planned {
		if err := w.manifest(ctx); err != nil {
			return err
		}
	}
	for {
		if w.newsDue && w.asked == 0 {
			// It has nothing that is wanted, and will say when it has more.
			w.source.rest(true)
		} else if err := w.askChunks(ctx); err != nil {
			return err
		}
		if len(w.pending) == 0 {
			f.mu.Lock()
			over := f.open == 0 || w.count == f.chunks
			f.mu.Unlock()
			if over {
				return nil
			}
			w.askHoldings(w.count)
			continue
		}
		a := w.pending[0]
		if a.chunk < 0 {
			if err := w.holdings(ctx); err != nil {
				return err
			}
			w.pending = w.pending[1:]
			w.source.move()
			continue
		}
		size, err := w.chunk(ctx, a)
		if err != nil {
			return fmt.Errorf("chunk %d: %w", a.chunk, err)
		}
		w.pending = w.pending[1:]
		w.asked--
		w.source.move()
		link.came(a.at, time.Now(), size)
		f.got(a.chunk, w.source)
	}
}

// askChunks asks for as many chunks as the connection has room for. Where
// nothing is under way it waits for room.
func (w *worker) askChunks(ctx context.Context) error {
	f, link := w.f, &w.session.link
	for {
		if !link.take() {
			f.mu.Lock()
			open := f.open > 0
			f.mu.Unlock()
			if len(w.pending) > 0 || !open {
				break
			}
			if err := link.wait(ctx); err != nil {
				return err
			}
		}
		i, ok, later := f.give(w)
		if !ok {
			link.free(1)
			if later && len(w.pending) == 0 {
				w.source.rest(true)
				pause(ctx, holdTime/10, nil)
				if ctx.Err() != nil {
					return ctx.Err()
				}
				continue
			}
			break
		}
		a := asked{chunk: i, packed: link.packs(f.h.cfg.Packing, w.local), at: time.Now()}
		w.pending = append(w.pending, a)
		w.asked++
		if a.packed {
			w.ask(wantPacked, i)
		} else {
			w.ask(wantChunk, i)
		}
	}
	if w.count < f.chunks && !w.newsDue && w.asked > 0 {
		w.askHoldings(0)
	}
	return nil
}

// askHoldings asks what the source has; it answers at once if it has more than
// known chunks.
func (w *worker) askHoldings(known int) {
	w.ask(wantHoldings, known)
	w.pending = append(w.pending, asked{chunk: -1})
	w.newsDue = true
}

// holdings reads what the source has.
func (w *worker) holdings(ctx context.Context) error {
	f := w.f
	if err := w.expect(ctx, statusOK); err != nil {
		return err
	}
	b := newBitset(f.chunks - 1)
	if err := w.read(ctx, b); err != nil {
		return err
	}
	has, count, err := decodeHoldings(b, f.chunks)
	if err != nil {
		return fmt.Errorf("%v: %w", err, errLie)
	}
	w.newsDue = false
	f.mu.Lock()
	defer f.mu.Unlock()
	w.count = count
	f.countLocked(w, has)
	return nil
}

// chunk reads a chunk to its place, and returns in how many bytes it came.
func (w *worker) chunk(ctx context.Context, a asked) (size int, err error) {
	f := w.f
	c := f.chunk(a.chunk)
	status, err := w.status(ctx)
	if err != nil {
		return 0, err
	}
	switch {
	case status == statusOK:
		if err := w.read(ctx, c); err != nil {
			return 0, err
		}
		size = len(c)
	case status == statusPacked && a.packed:
		var head [4]byte
		if err := w.read(ctx, head[:]); err != nil {
			return 0, err
		}
		n := binary.LittleEndian.Uint32(head[:])
		if uint64(n) >= uint64(len(c)) {
			return 0, fmt.Errorf("%d bytes packed into %d: %w", len(c), n, errLie)
		}
		buf := buffers.Get().(*[]byte)
		defer buffers.Put(buf)
		packed := (*buf)[:n]
		if err := w.read(ctx, packed); err != nil {
			return 0, err
		}
		if err := unpack(c, packed); err != nil {
			return 0, fmt.Errorf("%v: %w", err, errLie)
		}
		size = int(n)
		f.h.counts.savedIn.Add(uint64(len(c) - size))
	default:
		return 0, fmt.Errorf("status %d: %w", status, errLie)
	}
	if !f.right(a.chunk, c) {
		return 0, errLie
	}
	return size, nil
}

// right reports whether c is chunk i of the body.
func (f *fetch) right(i int, c []byte) bool {
	leaf := treehash.Leaf(i, c)
	if f.chunks == 1 {
		return treehash.Root(f.size, []treehash.Hash{leaf}) == f.hash
	}
	return leaf == f.leaves[i]
}

// manifest reads the leaves, and opens the fetch for other sources.
func (w *worker) manifest(ctx context.Context) error {
	f := w.f
	if err := w.expect(ctx, statusOK); err != nil {
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
	f.move()
	f.planWith(leaves)
	return nil
}

// planWith takes the first manifest that came.
func (f *fetch) planWith(leaves []treehash.Hash) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.leaves != nil {
		return
	}
	f.leaves = leaves
	p := &part{size: f.size, leaves: leaves, data: f.data, here: newBitset(f.chunks - 1)}
	for i := 0; f.resume && i < f.chunks; i++ {
		if f.right(i, f.chunk(i)) {
			f.wanted.clear(i)
			f.open--
			f.left--
			p.add(i)
		}
	}
	if f.swarm() && f.h.bodies.begin(f.hash, p) {
		f.part = p
	}
	f.changed()
}

// ask adds a request to those that are sent before the next answer is read.
func (w *worker) ask(kind byte, n int) {
	w.out = request{hash: w.f.hash, size: w.f.size, kind: kind, n: n}.append(w.out)
}

func (w *worker) send(ctx context.Context) error {
	if len(w.out) == 0 {
		return nil
	}
	if err := w.deadline(ctx, w.stream.SetWriteDeadline); err != nil {
		return err
	}
	_, err := w.stream.Write(w.out)
	w.out = w.out[:0]
	if err != nil {
		return fmt.Errorf("asking: %w", err)
	}
	return nil
}

// status reads the first byte of an answer: of one that holds something.
func (w *worker) status(ctx context.Context) (byte, error) {
	var b [1]byte
	if err := w.send(ctx); err != nil {
		return 0, err
	}
	if !w.greeted {
		if err := w.deadline(ctx, w.stream.SetReadDeadline); err != nil {
			return 0, err
		}
		if err := readHead(w.stream, bodyProtocol); err != nil {
			return 0, err
		}
		w.greeted = true
	}
	if err := w.read(ctx, b[:]); err != nil {
		return 0, err
	}
	switch b[0] {
	case statusAbsent:
		return 0, errAbsent
	case statusBusy:
		return 0, errors.New("it is busy")
	case statusRefused:
		return 0, errors.New("it refused the request")
	}
	return b[0], nil
}

func (w *worker) expect(ctx context.Context, want byte) error {
	got, err := w.status(ctx)
	if err == nil && got != want {
		err = fmt.Errorf("status %d: %w", got, errLie)
	}
	return err
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
		w.session.member.in.Add(uint64(k))
		w.session.heard.Store(int64(w.f.h.now()))
		if w.came += k; w.came >= progress {
			w.came = 0
			w.source.move()
			w.f.move()
		}
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
