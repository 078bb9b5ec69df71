package p2p

import (
	"context"
	"crypto/ed25519"
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
	cfg    Config
	self   *member
	hello  hello
	net    *fabric
	events *eventQueue
	counts counters
	bodies bodyServer
	start  time.Time
	links  chan struct{} // holds one token when a member came or went
	later  chan struct{} // holds one token when held messages are to be judged

	stop   chan struct{}      // closed when Close stops all goroutines
	cancel context.CancelFunc // closes stop, and ends the context that goroutines get
	wg     sync.WaitGroup     // every goroutine but the event queue's and the swarm's

	closing  sync.Once
	closeErr error

	mu       sync.Mutex
	closed   bool
	roster   *roster
	sparse   bool                      // not all members are neighbours
	lenient  time.Duration             // until then others may take the roster for a sparse one; 0: they do not
	position int                       // of this peer among the roster's members
	sessions map[network.Conn]*session // of every member's connection, up or not
	guests   map[network.Conn]*guest   // strangers, and members that ask to join
	kept     kept
	others   bucket        // of messages whose signer is no member
	gone     chan struct{} // closed when the last session ends after closed
}

// New starts a host: it listens, and dials members once SetAddresses names
// their addresses.
func New(cfg Config) (*Host, error) {
	cfg, err := cfg.validate()
	if err != nil {
		return nil, fmt.Errorf("p2p: %w", err)
	}
	id, err := libp2pID(cfg.Key.Public().(ed25519.PublicKey))
	if err != nil {
		return nil, fmt.Errorf("p2p: %w", err)
	}
	h := &Host{
		cfg: cfg, start: time.Now().Add(-before), hello: hello{job: cfg.Job},
		events:   newEventQueue(cfg.Limits.Events),
		sessions: make(map[network.Conn]*session), guests: make(map[network.Conn]*guest),
		gone: make(chan struct{}), stop: make(chan struct{}), links: make(chan struct{}, 1), later: make(chan struct{}, 1),
	}
	if h.roster, h.self, err = newRoster(cfg.Members, id, &roster{}, cfg.Limits.Serves); err != nil {
		return nil, fmt.Errorf("p2p: %w", err)
	}
	var run [8]byte
	rand.Read(run[:]) // never fails
	h.hello.run = binary.LittleEndian.Uint64(run[:])
	ctx, cancel := context.WithCancel(context.Background())
	h.cancel = sync.OnceFunc(func() { close(h.stop); cancel() })
	h.kept.init(cfg.Limits.KeptMessages, cfg.Limits.KeptBytes, max(stickyBytes, cfg.Limits.MessageSize))
	h.bodies.leaves = make(map[treehash.Hash]*leafList)
	h.net, err = newFabric(cfg.Key, cfg.Limits.capacity(len(cfg.Members)), cfg.Limits, gater{h})
	if err != nil {
		return nil, fmt.Errorf("p2p: %w", err)
	}
	h.net.swarm.SetStreamHandler(func(s network.Stream) { h.handleStream(ctx, s) })
	h.net.swarm.Notify(&network.NotifyBundle{
		ConnectedF:    func(_ network.Network, c network.Conn) { h.connected(ctx, c) },
		DisconnectedF: func(_ network.Network, c network.Conn) { h.guestLeft(c) },
	})
	go h.events.run(h.stop)
	for _, l := range cfg.Listen {
		if err := h.net.listen(l); err != nil {
			h.Close() // the first error is the one to report
			return nil, fmt.Errorf("p2p: %w", err)
		}
	}
	h.spawn(h.beat)
	h.spawn(h.judge)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.meshLocked()
	for _, m := range h.roster.members {
		h.dialLocked(m)
	}
	return h, nil
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

// closeLocked closes a connection, which may take a moment.
func (h *Host) closeLocked(c network.Conn) {
	if !h.spawnLocked(func() { c.Close() }) {
		c.Close()
	}
}

// before is more than the oldest age that neighbours gossip.
const before = 2 * time.Hour

// now is the time on the monotonic clock, from some moment well before the host
// started.
func (h *Host) now() time.Duration { return time.Since(h.start) }

// ID returns this peer's own identity.
func (h *Host) ID() PeerID { return h.self.name }

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
	h.mu.Lock()
	m := h.roster.at[of]
	h.mu.Unlock()
	if m == nil {
		return fmt.Errorf("p2p: addresses of member %d: there is none of that index", of)
	}
	if len(addrs) > maxAddresses {
		return fmt.Errorf("p2p: %d addresses of member %d: at most %d", len(addrs), of, maxAddresses)
	}
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
	m.refused, m.bad = time.Now().Add(h.cfg.Limits.Penalty), 0
	if !m.expelled {
		m.why = why
	}
	h.dropMemberLocked(m, why)
}

// blame counts something bad that a member sent, and refuses the member when
// there is too much of it.
func (h *Host) blame(m *member, what string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.blameLocked(m, what)
}

func (h *Host) blameLocked(m *member, what string) {
	if m.bad++; m.bad < h.cfg.Limits.Bad {
		return
	}
	h.refuseLocked(m, fmt.Sprintf("it sent %d times what no honest peer sends, last %s", m.bad, what))
}

// gater lets members through, and guests where they are welcome.
type gater struct{ h *Host }

func (g gater) admit(dir network.Direction, id peer.ID, addr ma.Multiaddr) bool {
	g.h.mu.Lock()
	why := ""
	switch m := g.h.roster.of[id]; {
	case m == nil:
		why = g.h.turnGuestLocked(dir, addr)
	case m == g.h.self:
		why = "it has this peer's own identity: start each peer with a key of its own"
	case m.turnedAway(time.Now()):
		why = m.why
	}
	g.h.mu.Unlock()
	if why != "" {
		g.h.reportRefused(id, addr, why)
	}
	return why == ""
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
	MessageBytesIn, MessageBytesOut     uint64 // frames on message streams, heartbeats excepted
	HeartbeatBytesIn, HeartbeatBytesOut uint64 // frames with heartbeats
	BodyBytesIn, BodyBytesOut           uint64 // manifests, chunks and holdings, as they travelled
	BodySavedIn, BodySavedOut           uint64 // bytes that packing saved of them
	BodyTraded                          uint64 // chunks served of bodies that were being fetched
	MessagesIn, MessagesOut             uint64 // as sent over connections, duplicates included
	Delivered                           uint64 // events of kind Message
	Duplicates                          uint64 // messages that were here before
	Stale                               uint64 // messages below Forget's slot, or beyond what is kept of a member
	Bad                                 uint64 // messages that failed Check
	NotYet                              uint64 // messages that could not be judged when they came
	NotYetLost                          uint64 // and were dropped, to be asked for again
	Flood                               uint64 // messages beyond Limits.Rate, from their signer
	FloodRelayed                        uint64 // and from others
	Paced                               uint64 // times that a connection was read more slowly for what it brought
	BadBodies                           uint64 // false chunks and manifests
	Malformed                           uint64 // frames and requests that are not of the protocol
	Oversize                            uint64 // frames over their bound
	Slow                                uint64 // members disconnected because their queue was full
	Silent                              uint64 // members disconnected because no heartbeat came
	Refused                             uint64 // connections turned away
	Banned                              uint64 // members refused for Penalty
	Crowded                             uint64 // connections of members that are no neighbours, beyond twice Limits.Neighbours
	Guests                              uint64 // requests to join that were answered
	GuestsRefused                       uint64 // and those that were not, for their number or what they sent
	KeptMessages, KeptBytes             int    // now
	Connected                           int    // members that are there, now
	Links                               int    // members with a connection to this peer, now
}

type counters struct {
	messageIn, messageOut, heartbeatIn, heartbeatOut, flood, floodRelayed, paced, bodyIn, bodyOut, savedIn, savedOut, traded, messagesIn, messagesOut, delivered, duplicates, stale, bad, notYet, notYetLost,
	badBodies, malformed, oversize, slow, silent, refused, banned, guests, guestsRefused, crowded atomic.Uint64
}

// Stats returns the counts so far.
func (h *Host) Stats() Stats {
	c := &h.counts
	s := Stats{
		MessageBytesIn: c.messageIn.Load(), MessageBytesOut: c.messageOut.Load(),
		HeartbeatBytesIn: c.heartbeatIn.Load(), HeartbeatBytesOut: c.heartbeatOut.Load(),
		Flood: c.flood.Load(), FloodRelayed: c.floodRelayed.Load(), Paced: c.paced.Load(),
		BodyBytesIn: c.bodyIn.Load(), BodyBytesOut: c.bodyOut.Load(),
		BodySavedIn: c.savedIn.Load(), BodySavedOut: c.savedOut.Load(), BodyTraded: c.traded.Load(),
		MessagesIn: c.messagesIn.Load(), MessagesOut: c.messagesOut.Load(), Delivered: c.delivered.Load(),
		Duplicates: c.duplicates.Load(), Stale: c.stale.Load(), Bad: c.bad.Load(), NotYet: c.notYet.Load(), NotYetLost: c.notYetLost.Load(), BadBodies: c.badBodies.Load(),
		Malformed: c.malformed.Load(), Oversize: c.oversize.Load(), Slow: c.slow.Load(), Silent: c.silent.Load(),
		Refused: c.refused.Load(), Banned: c.banned.Load(),
		Crowded: c.crowded.Load(), Guests: c.guests.Load(), GuestsRefused: c.guestsRefused.Load(),
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	s.KeptMessages, s.KeptBytes = h.kept.size()
	for _, m := range h.roster.members {
		if m.present {
			s.Connected++
		}
		if m.session() != nil {
			s.Links++
		}
	}
	return s
}

// Traffic is what went between this host and a member, in bytes of messages,
// heartbeats and bodies, since the member was added.
type Traffic struct {
	Member  int
	In, Out uint64
}

// Traffic returns that of each member, by ascending index.
func (h *Host) Traffic() []Traffic {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make([]Traffic, 0, len(h.roster.members))
	for _, m := range h.roster.members {
		out = append(out, Traffic{Member: m.index, In: m.in.Load(), Out: m.out.Load()})
	}
	return out
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
	for _, m := range h.roster.members {
		m.leave()
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
