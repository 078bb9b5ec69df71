package p2p

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"

	"github.com/spirt-ml/spirt/internal/treehash"
)

// Host is this peer's end of all connections. Its methods are safe for
// concurrent use.
type Host struct {
	cfg     Config
	self    int
	hello   hello
	members []*member
	index   map[peer.ID]int // of members, this peer included
	net     *fabric
	events  *eventQueue
	counts  counters
	bodies  bodyServer
	start   time.Time
	links   chan struct{} // holds one token when a member came or went

	stop   chan struct{}      // closed when Close stops all goroutines
	cancel context.CancelFunc // closes stop, and ends the context that goroutines get
	wg     sync.WaitGroup     // every goroutine but the event queue's and the swarm's

	closing  sync.Once
	closeErr error

	mu       sync.Mutex
	closed   bool
	sessions map[network.Conn]*session // of every connection, up or not
	kept     kept
	gone     chan struct{} // closed when the last session ends after closed
}

// member is what the host knows of one member of the roster. Fields below the
// line are guarded by Host.mu.
type member struct {
	index int
	id    peer.ID
	name  PeerID
	wake  chan struct{} // tells the dialler that something changed
	slots chan struct{} // one for each request of its that is answered

	// ----
	sessions []*session // those that are up; messages go to the first
	addrs    []ma.Multiaddr
	fresh    bool // addrs changed since the dialler looked
	bad      int  // messages and chunks that failed their check
	refused  time.Time
	why      string // it is refused until then
}

func (m *member) poke() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// session returns the one that messages go to, nil if it is not connected.
func (m *member) session() *session {
	if len(m.sessions) == 0 {
		return nil
	}
	return m.sessions[0]
}

// New starts a host: it listens, and dials members once SetAddresses names
// their addresses.
func New(cfg Config) (*Host, error) {
	cfg, self, err := cfg.validate()
	if err != nil {
		return nil, fmt.Errorf("p2p: %w", err)
	}
	h := &Host{
		cfg: cfg, self: self, start: time.Now(),
		index:    make(map[peer.ID]int, len(cfg.Members)),
		events:   newEventQueue(cfg.Limits.Events),
		sessions: make(map[network.Conn]*session),
		gone:     make(chan struct{}), stop: make(chan struct{}), links: make(chan struct{}, 1),
	}
	ctx, cancel := context.WithCancel(context.Background())
	h.cancel = sync.OnceFunc(func() { close(h.stop); cancel() })
	h.kept.init(len(cfg.Members), cfg.Limits.KeptMessages, cfg.Limits.KeptBytes)
	h.bodies.leaves = make(map[treehash.Hash]*leafList)
	if err := h.setUpRoster(); err != nil {
		return nil, fmt.Errorf("p2p: %w", err)
	}
	h.net, err = newFabric(cfg.Key, len(cfg.Members), cfg.Limits, gater{h})
	if err != nil {
		return nil, fmt.Errorf("p2p: %w", err)
	}
	h.net.swarm.SetStreamHandler(h.handleStream)
	h.net.swarm.Notify(&network.NotifyBundle{ConnectedF: func(_ network.Network, c network.Conn) { h.connected(ctx, c) }})
	go h.events.run(h.stop)
	for _, l := range cfg.Listen {
		if err := h.net.listen(l); err != nil {
			h.Close() // the first error is the one to report
			return nil, fmt.Errorf("p2p: %w", err)
		}
	}
	h.spawn(h.beat)
	for _, m := range h.members {
		if m.index != self {
			h.spawn(func() { h.dial(ctx, m) })
		}
	}
	return h, nil
}

func (h *Host) setUpRoster() error {
	var keys []byte
	for i, key := range h.cfg.Members {
		id, err := libp2pID(key)
		if err != nil {
			return fmt.Errorf("member %d: %w", i, err)
		}
		h.index[id] = i
		h.members = append(h.members, &member{
			index: i, id: id, name: PeerID(id.String()),
			wake: make(chan struct{}, 1), slots: make(chan struct{}, h.cfg.Limits.Serves),
		})
		keys = append(keys, key...)
	}
	var run [8]byte
	if _, err := rand.Read(run[:]); err != nil {
		return err
	}
	h.hello = hello{job: h.cfg.Job, roster: treehash.Sum(keys), run: binary.LittleEndian.Uint64(run[:])}
	return nil
}

// spawn runs f in a goroutine that Close waits for, and reports whether it did:
// a closed host starts nothing.
func (h *Host) spawn(f func()) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.spawnLocked(f)
}

func (h *Host) spawnLocked(f func()) bool {
	if h.closed {
		return false
	}
	h.wg.Go(f)
	return true
}

// now is the time since the host started, on the monotonic clock.
func (h *Host) now() time.Duration { return time.Since(h.start) }

// ID returns this peer's own identity.
func (h *Host) ID() PeerID { return h.members[h.self].name }

// Addrs returns the multiaddresses that this peer listens on, each with its
// identity at the end.
func (h *Host) Addrs() []string {
	addrs, err := h.net.swarm.InterfaceListenAddresses()
	if err != nil {
		h.cfg.Logger.Warn("p2p: listing the addresses of this machine", "err", err)
	}
	out := make([]string, 0, len(addrs))
	for _, a := range addrs {
		out = append(out, fmt.Sprintf("%s/p2p/%s", a, h.ID()))
	}
	return out
}

// Events returns the channel on which everything arrives. It must be read: a
// host whose events wait stops reading from members. Close closes it.
func (h *Host) Events() <-chan Event { return h.events.out }

// SetAddresses tells where a member may be reached: multiaddresses, with or
// without its identity at the end, or host:port. They replace those of earlier
// calls, and are dialled, again and again while it is not connected. An
// address that names another identity is an error, and then nothing changes.
func (h *Host) SetAddresses(of int, addrs []string) error {
	const maxAddresses = 16
	if of < 0 || of >= len(h.members) {
		return fmt.Errorf("p2p: addresses of member %d of %d", of, len(h.members))
	}
	if len(addrs) > maxAddresses {
		return fmt.Errorf("p2p: %d addresses of member %d: at most %d", len(addrs), of, maxAddresses)
	}
	m := h.members[of]
	parsed := make([]ma.Multiaddr, 0, len(addrs))
	for _, s := range addrs {
		addr, id, err := parseAddress(s)
		if err != nil {
			return fmt.Errorf("p2p: member %d: %w", of, err)
		}
		if id != "" && id != m.id {
			return fmt.Errorf("p2p: address %q of member %d names %s, but that member is %s", s, of, id, m.name)
		}
		parsed = append(parsed, addr)
	}
	h.mu.Lock()
	m.addrs, m.fresh = parsed, true
	h.mu.Unlock()
	m.poke()
	return nil
}

// refuseLocked disconnects a member and turns it away for Limits.Penalty.
func (h *Host) refuseLocked(m *member, why string) {
	h.counts.banned.Add(1)
	m.refused, m.why, m.bad = time.Now().Add(h.cfg.Limits.Penalty), why, 0
	for _, s := range h.sessions {
		if s.member == m {
			h.dropLocked(s, why)
		}
	}
}

// blame counts something bad that a member sent, and refuses the member when
// there is too much of it.
func (h *Host) blame(m *member, what string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if m.bad++; m.bad < h.cfg.Limits.Bad {
		return
	}
	h.refuseLocked(m, fmt.Sprintf("it sent %d times what no honest peer sends, last %s", m.bad, what))
}

// gater lets members through and nobody else.
type gater struct{ h *Host }

func (g gater) admit(id peer.ID, addr ma.Multiaddr) bool {
	i, ok := g.h.index[id]
	why := "it is not on the roster of this job"
	if ok && i != g.h.self {
		m := g.h.members[i]
		g.h.mu.Lock()
		ok, why = !time.Now().Before(m.refused), m.why
		g.h.mu.Unlock()
	} else if ok {
		ok, why = false, "it has this peer's own identity: start each peer with a key of its own"
	}
	if !ok {
		g.h.reportRefused(id, addr, why)
	}
	return ok
}

func (h *Host) reportRefused(id peer.ID, addr ma.Multiaddr, why string) {
	h.counts.refused.Add(1)
	e := Refused{Remote: PeerID(id.String()), Reason: why}
	if addr != nil {
		e.Address = addr.String()
	}
	h.cfg.Logger.Debug("p2p: refused", "peer", e.Remote, "address", e.Address, "reason", why)
	h.events.putRefused(e, time.Now())
}

// Stats counts what happened since New.
type Stats struct {
	MessageBytesIn, MessageBytesOut uint64 // frames on message streams, heartbeats included
	BodyBytesIn, BodyBytesOut       uint64 // manifests and chunks
	MessagesIn, MessagesOut         uint64 // as sent over connections, duplicates included
	Delivered                       uint64 // events of kind Message
	Duplicates                      uint64 // messages that were here before
	Stale                           uint64 // messages below Forget's slot, or beyond what is kept of a member
	Bad                             uint64 // messages that failed Check
	BadBodies                       uint64 // false chunks and manifests
	Malformed                       uint64 // frames and requests that are not of the protocol
	Oversize                        uint64 // frames over their bound
	Slow                            uint64 // members disconnected because their queue was full
	Silent                          uint64 // members disconnected because no heartbeat came
	Refused                         uint64 // connections turned away
	Banned                          uint64 // members refused for Penalty
	KeptMessages, KeptBytes         int    // now
	Connected                       int    // members, now
}

type counters struct {
	messageIn, messageOut, bodyIn, bodyOut, messagesIn, messagesOut, delivered, duplicates, stale, bad,
	badBodies, malformed, oversize, slow, silent, refused, banned atomic.Uint64
}

// Stats returns the counts so far.
func (h *Host) Stats() Stats {
	c := &h.counts
	s := Stats{
		MessageBytesIn: c.messageIn.Load(), MessageBytesOut: c.messageOut.Load(),
		BodyBytesIn: c.bodyIn.Load(), BodyBytesOut: c.bodyOut.Load(),
		MessagesIn: c.messagesIn.Load(), MessagesOut: c.messagesOut.Load(), Delivered: c.delivered.Load(),
		Duplicates: c.duplicates.Load(), Stale: c.stale.Load(), Bad: c.bad.Load(), BadBodies: c.badBodies.Load(),
		Malformed: c.malformed.Load(), Oversize: c.oversize.Load(), Slow: c.slow.Load(), Silent: c.silent.Load(),
		Refused: c.refused.Load(), Banned: c.banned.Load(),
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	s.KeptMessages, s.KeptBytes = h.kept.size()
	for _, m := range h.members {
		if m.session() != nil {
			s.Connected++
		}
	}
	return s
}

// byeTime is how long Close waits for members to take in what was sent to them.
const byeTime = time.Second

// Close says good-bye to all members, so that what was broadcast still gets to
// them, stops everything and waits for it, and closes Events. Fetches that run
// end with an error. Events need not be read meanwhile.
func (h *Host) Close() error {
	h.closing.Do(func() { h.closeErr = h.shut() })
	return h.closeErr
}

func (h *Host) shut() error {
	h.mu.Lock()
	h.closed = true
	for _, s := range h.sessions {
		if s.up {
			h.enqueueLocked(s, outFrame{kind: frameBye})
		} else {
			h.dropLocked(s, "this peer stops")
		}
	}
	if len(h.sessions) == 0 {
		close(h.gone)
	}
	h.mu.Unlock()

	patience := time.NewTimer(byeTime)
	select {
	case <-h.gone:
	case <-patience.C:
	}
	patience.Stop()
	h.mu.Lock()
	for _, s := range h.sessions {
		h.dropLocked(s, "this peer stops")
	}
	h.mu.Unlock()
	h.cancel()
	err := h.net.close()
	h.wg.Wait()
	for range h.events.out { // closed by its goroutine
	}
	return err
}

var errClosed = errors.New("p2p: the host is closed")
