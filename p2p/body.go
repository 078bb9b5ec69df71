package p2p

import (
	"errors"
	"fmt"
	"io"
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
)

// bodyServer remembers the leaves of bodies.
type bodyServer struct {
	mu     sync.Mutex
	leaves map[treehash.Hash]*leafList
	order  []treehash.Hash // oldest first
	total  int             // leaves in the cache
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
			_ = h.writeBody(stream, []byte{statusRefused}) // the stream is given up either way
			return errProtocol{err}
		}
		if err := h.serveOne(m, stream, r); err != nil {
			return err
		}
	}
}

// serveOne answers one request, straight from the body's own bytes.
func (h *Host) serveOne(m *member, stream network.Stream, r request) error {
	patience := time.NewTimer(h.cfg.Limits.Chunk / 2)
	defer patience.Stop()
	select {
	case m.slots <- struct{}{}:
		defer func() { <-m.slots }()
	case <-patience.C:
		return h.writeBody(stream, []byte{statusBusy})
	case <-h.stop:
		return errClosed
	}
	var (
		data    []byte
		release func()
		ok      bool
	)
	if h.cfg.Bodies != nil {
		data, release, ok = h.cfg.Bodies.Body(r.hash)
	}
	if ok && release != nil {
		defer release()
	}
	if !ok || int64(len(data)) != r.size {
		return h.writeBody(stream, []byte{statusAbsent})
	}
	if r.kind == wantManifest {
		leaves := h.bodies.leavesOf(r.hash, r.size, func() []treehash.Hash { return treehash.Leaves(data) })
		answer := make([]byte, 1, 1+len(leaves)*len(treehash.Hash{}))
		for i := range leaves {
			answer = append(answer, leaves[i][:]...)
		}
		return h.writeBody(stream, answer)
	}
	lo := int64(r.first) * treehash.ChunkSize
	hi := min(r.size, int64(r.first+r.count)*treehash.ChunkSize)
	if err := h.writeBody(stream, []byte{statusOK}); err != nil {
		return err
	}
	for ; lo < hi; lo += treehash.ChunkSize {
		if err := h.writeBody(stream, data[lo:min(hi, lo+treehash.ChunkSize)]); err != nil {
			return err
		}
	}
	return nil
}

func (h *Host) writeBody(stream network.Stream, b []byte) error {
	if err := stream.SetWriteDeadline(time.Now().Add(h.cfg.Limits.Chunk)); err != nil {
		return err
	}
	n, err := stream.Write(b)
	h.counts.bodyOut.Add(uint64(n))
	if err != nil {
		return fmt.Errorf("writing %d bytes: %w", len(b), err)
	}
	return nil
}
