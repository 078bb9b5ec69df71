package p2p

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/spirt-ml/spirt/internal/treehash"
)

const (
	idleTime = 10 * time.Second // a body stream without a request is closed
	// cachedLeaves bounds the leaves kept of bodies that were asked for or
	// fetched: 32 bytes for each 256 KiB of body.
	cachedLeaves = 64 << 10
	// holdTime is how long an answer about holdings waits for news.
	holdTime = 250 * time.Millisecond
)

// bodyServer remembers the leaves of bodies, and those bodies that are being
// fetched.
type bodyServer struct {
	mu     sync.Mutex
	leaves map[treehash.Hash]*leafList
	order  []treehash.Hash // oldest first
	total  int             // leaves in the cache
	parts  map[treehash.Hash]*part
	began  chan struct{} // nil or closed when the next part is there
}

// part is a body that is being fetched: what came is served to others.
type part struct {
	size   int64
	leaves []treehash.Hash

	mu    sync.RWMutex
	data  []byte // nil when the fetch has ended
	here  bitset
	count int           // chunks that are here
	grown chan struct{} // nil or closed when there is one more, or the fetch ends
}

// begin offers the part to others, unless there is one of that body already.
func (b *bodyServer) begin(hash treehash.Hash, p *part) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.parts[hash] != nil {
		return false
	}
	if b.parts == nil {
		b.parts = make(map[treehash.Hash]*part)
	}
	b.parts[hash] = p
	if b.began != nil {
		close(b.began)
		b.began = nil
	}
	return true
}

// end takes it back. After that nobody reads the data.
func (b *bodyServer) end(hash treehash.Hash, p *part) {
	b.mu.Lock()
	delete(b.parts, hash)
	b.mu.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.data = nil
	p.newsLocked()
}

// part returns what is here of a body that is being fetched, or nil and a
// channel that is closed when some fetch begins.
func (b *bodyServer) part(hash treehash.Hash, size int64) (*part, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if p := b.parts[hash]; p != nil && p.size == size {
		return p, nil
	}
	if b.began == nil {
		b.began = make(chan struct{})
	}
	return nil, b.began
}

func (p *part) newsLocked() {
	if p.grown != nil {
		close(p.grown)
		p.grown = nil
	}
}

// add says that a chunk is in its place, and right.
func (p *part) add(i int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.here.set(i)
	p.count++
	p.newsLocked()
}

// copy appends a chunk to dst, if it is here.
func (p *part) copy(dst []byte, i int) ([]byte, bool) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if p.data == nil || !p.here.has(i) {
		return dst, false
	}
	return append(dst, chunkOf(p.data, i)...), true
}

// ended is closed.
var ended = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

// holdings appends the bitmap to dst, and returns a channel that is closed when
// there is more, or the fetch has ended.
func (p *part) holdings(dst []byte) (_ []byte, count int, grown <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.data == nil {
		return dst, 0, ended
	}
	if p.grown == nil {
		p.grown = make(chan struct{})
	}
	return append(dst, p.here...), p.count, p.grown
}

// chunkOf returns chunk i of a body.
func chunkOf(data []byte, i int) []byte {
	lo := int64(i) * treehash.ChunkSize
	return data[lo:min(int64(len(data)), lo+treehash.ChunkSize)]
}

// leafList is computed once, also when several peers ask at the same time.
type leafList struct {
	once   sync.Once
	leaves []treehash.Hash
}

// leavesOf returns the leaves of the body named hash, computing them where
// they are not known.
func (b *bodyServer) leavesOf(hash treehash.Hash, size int64, compute func() []treehash.Hash) []treehash.Hash {
	b.mu.Lock()
	l := b.leaves[hash]
	if l == nil {
		l = &leafList{}
		n := treehash.NumChunks(size)
		for b.total+n > cachedLeaves && len(b.order) > 0 {
			old := b.order[0]
			b.order = b.order[1:]
			b.total -= len(b.leaves[old].leaves)
			delete(b.leaves, old)
		}
		if n <= cachedLeaves {
			// Counted before they are there: what is evicted must count the same.
			l.leaves = make([]treehash.Hash, n)
			b.leaves[hash] = l
			b.order = append(b.order, hash)
			b.total += n
		}
	}
	b.mu.Unlock()
	l.once.Do(func() {
		if got := compute(); len(l.leaves) == len(got) {
			copy(l.leaves, got)
		} else {
			l.leaves = got // too many to cache: this list is nobody else's
		}
	})
	return l.leaves
}

// serve answers the requests on one stream until its opener closes it.
func (h *Host) serve(s *session, stream network.Stream) {
	err := h.serveAll(s.member, stream)
	if errors.Is(err, io.EOF) {
		stream.Close()
		return
	}
	h.cfg.Logger.Debug("p2p: serving a body", "member", s.member.index, "err", err)
	var bad errProtocol
	if errors.As(err, &bad) {
		stream.Close() // and not Reset: the status is to arrive
		h.counts.malformed.Add(1)
		h.blame(s.member, err.Error())
		return
	}
	stream.Reset()
}

// serveAll ends with io.EOF where the opener closed the stream.
func (h *Host) serveAll(m *member, stream network.Stream) error {
	var buf [requestSize]byte
	for {
		if err := stream.SetReadDeadline(time.Now().Add(idleTime)); err != nil {
			return err
		}
		if _, err := io.ReadFull(stream, buf[:]); err != nil {
			return err
		}
		r, err := decodeRequest(buf[:], h.cfg.Limits.BodySize)
		if err != nil {
			_ = h.writeBody(m, stream, []byte{statusRefused}) // the stream is given up either way
			return errProtocol{err}
		}
		if err := h.serveOne(m, stream, r); err != nil {
			return err
		}
	}
}

// serveOne answers one request.
func (h *Host) serveOne(m *member, stream network.Stream, r request) error {
	if r.kind == wantHoldings {
		return h.serveHoldings(m, stream, r)
	}
	patience := time.NewTimer(h.cfg.Limits.Chunk / 2)
	defer patience.Stop()
	select {
	case m.slots <- struct{}{}:
		defer func() { <-m.slots }()
	case <-patience.C:
		return h.writeBody(m, stream, []byte{statusBusy})
	case <-h.stop:
		return errClosed
	}
	data, release, ok := h.held(r)
	if ok {
		// Straight from the body's own bytes.
		defer release()
		if r.kind == wantManifest {
			return h.serveManifest(m, stream, h.bodies.leavesOf(r.hash, r.size, func() []treehash.Hash { return treehash.Leaves(data) }))
		}
		return h.serveChunk(m, stream, r, chunkOf(data, r.n))
	}
	if p, _ := h.bodies.part(r.hash, r.size); p != nil {
		if r.kind == wantManifest {
			return h.serveManifest(m, stream, p.leaves)
		}
		// A copy, so that whoever fetches need not wait for whoever reads slowly.
		buf := buffers.Get().(*[]byte)
		defer buffers.Put(buf)
		if *buf, ok = p.copy((*buf)[:0], r.n); ok {
			h.counts.traded.Add(1)
			return h.serveChunk(m, stream, r, *buf)
		}
	}
	return h.writeBody(m, stream, []byte{statusAbsent})
}

// held returns a body that is here as a whole.
func (h *Host) held(r request) (data []byte, release func(), ok bool) {
	if h.cfg.Bodies != nil {
		data, release, ok = h.cfg.Bodies.Body(r.hash)
	}
	if release == nil {
		release = func() {}
	}
	if ok && int64(len(data)) != r.size {
		release()
		ok = false
	}
	return data, release, ok
}

// serveHoldings says which chunks are here. It waits a moment for more than
// the asker knows, so that who asks again and again hears of chunks soon and
// does not ask often.
func (h *Host) serveHoldings(m *member, stream network.Stream, r request) error {
	late := time.NewTimer(holdTime)
	defer late.Stop()
	// What was fetched is soon held as a whole; nobody says when.
	look := time.NewTicker(holdTime / 10)
	defer look.Stop()
	chunks := treehash.NumChunks(r.size)
	for last := false; ; {
		answer, count := []byte{statusOK}, chunks
		var news <-chan struct{}
		if _, release, ok := h.held(r); ok {
			release()
			all := newBitset(chunks - 1)
			for i := range chunks {
				all.set(i)
			}
			answer = append(answer, all...)
		} else {
			var p *part
			if p, news = h.bodies.part(r.hash, r.size); p != nil {
				answer, count, news = p.holdings(answer)
			}
			if len(answer) == 1 {
				answer, count = []byte{statusAbsent}, 0
			}
		}
		if last || count > r.n || count == chunks {
			return h.writeBody(m, stream, answer)
		}
		select {
		case <-news:
		case <-look.C:
		case <-late.C:
			last = true
		case <-h.stop:
			return errClosed
		}
	}
}

func (h *Host) serveManifest(m *member, stream network.Stream, leaves []treehash.Hash) error {
	answer := make([]byte, 1, 1+len(leaves)*len(treehash.Hash{}))
	for i := range leaves {
		answer = append(answer, leaves[i][:]...)
	}
	return h.writeBody(m, stream, answer)
}

// buffers are for chunks: copies of them, and packed ones.
var buffers = sync.Pool{New: func() any { b := make([]byte, 0, treehash.ChunkSize+64); return &b }}

// packers bounds how many chunks are packed at once in this process; others
// go as they are.
var packers = make(chan struct{}, runtime.GOMAXPROCS(0))

func (h *Host) serveChunk(m *member, stream network.Stream, r request, chunk []byte) error {
	if r.kind == wantPacked {
		select {
		case packers <- struct{}{}:
			buf := buffers.Get().(*[]byte)
			defer buffers.Put(buf)
			answer, smaller := pack(append((*buf)[:0], statusPacked, 0, 0, 0, 0), chunk)
			<-packers
			*buf = answer
			if smaller {
				binary.LittleEndian.PutUint32(answer[1:], uint32(len(answer)-5))
				h.counts.savedOut.Add(uint64(len(chunk) - (len(answer) - 5)))
				return h.writeBody(m, stream, answer)
			}
		default:
		}
	}
	if err := h.writeBody(m, stream, []byte{statusOK}); err != nil {
		return err
	}
	return h.writeBody(m, stream, chunk)
}

func (h *Host) writeBody(m *member, stream network.Stream, b []byte) error {
	if err := stream.SetWriteDeadline(time.Now().Add(h.cfg.Limits.Chunk)); err != nil {
		return err
	}
	n, err := stream.Write(b)
	h.counts.bodyOut.Add(uint64(n))
	m.out.Add(uint64(n))
	if err != nil {
		return fmt.Errorf("writing %d bytes: %w", len(b), err)
	}
	return nil
}
