package p2p

import (
	"context"
	"crypto/ed25519"
	"fmt"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

// member is what the host knows of one member of the roster. One whose key is
// replaced becomes another member. Fields below the line are guarded by
// Host.mu.
type member struct {
	index int
	id    peer.ID
	name  PeerID
	wake  chan struct{} // tells the dialler that something changed
	slots chan struct{} // one for each request of its that is answered
	leave func()        // ends its dialler

	in, out atomic.Uint64 // bytes of messages, heartbeats and bodies that it sent, and was sent

	// ----
	sessions []*session // those that are up; messages go to the first
	replaced [4]uint64  // the runs of its process that gave way to another last
	addrs    []ma.Multiaddr
	fresh    bool          // addrs changed since the dialler looked
	up       chan struct{} // closed and replaced when a session comes up
	near     bool          // a neighbour: a connection to it is kept
	present  bool          // the application takes it to be there
	heard    time.Duration // Host.now when anybody heard it last; zero: never
	demand   time.Duration // until then a connection is wanted though it is not near
	signed   bucket        // messages
	bad      int           // messages and chunks that failed their check
	refused  time.Time
	expelled bool
	why      string // it is refused until then, or for good
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

// turnedAway reports whether it is to be refused now. Host.mu is held.
func (m *member) turnedAway(now time.Time) bool { return m.expelled || now.Before(m.refused) }

// roster is who is a member now. It is replaced as a whole, never changed.
type roster struct {
	members []*member // ascending index
	at      map[int]*member
	of      map[peer.ID]*member
	highest int // index
}

// newRoster takes over from old those members whose index and key stay.
func newRoster(list []Member, own peer.ID, old *roster, serves int) (_ *roster, self *member, err error) {
	if len(list) > MaxMembers {
		return nil, nil, fmt.Errorf("a roster of %d members: at most %d", len(list), MaxMembers)
	}
	r := &roster{at: make(map[int]*member, len(list)), of: make(map[peer.ID]*member, len(list))}
	for _, x := range list {
		if x.Index < 0 || x.Index > MaxIndex {
			return nil, nil, fmt.Errorf("a member of index %d: want 0 to %d", x.Index, MaxIndex)
		}
		if len(x.Key) != ed25519.PublicKeySize {
			return nil, nil, fmt.Errorf("member %d: an Ed25519 public key has %d bytes, not %d", x.Index, ed25519.PublicKeySize, len(x.Key))
		}
		id, err := libp2pID(x.Key)
		if err != nil {
			return nil, nil, fmt.Errorf("member %d: %w", x.Index, err)
		}
		if o := r.of[id]; o != nil {
			return nil, nil, fmt.Errorf("members %d and %d have one key", o.index, x.Index)
		}
		if r.at[x.Index] != nil {
			return nil, nil, fmt.Errorf("two members of index %d", x.Index)
		}
		m := old.at[x.Index]
		if m == nil || m.id != id {
			m = &member{
				index: x.Index, id: id, name: PeerID(id.String()),
				wake: make(chan struct{}, 1), slots: make(chan struct{}, serves), leave: func() {}, up: make(chan struct{}),
			}
		}
		r.at[x.Index], r.of[id] = m, m
		r.highest = max(r.highest, x.Index)
	}
	if self = r.of[own]; self == nil {
		return nil, nil, fmt.Errorf("this peer, %s, is not among the %d members: add it to the roster or use a member's key", own, len(list))
	}
	for _, i := range slices.Sorted(maps.Keys(r.at)) {
		r.members = append(r.members, r.at[i])
	}
	return r, self, nil
}

// has reports whether m is a member still.
func (r *roster) has(m *member) bool { return r.at[m.index] == m }

// SetMembers replaces the roster. Members that are not on it any more are
// disconnected, and so are those whose key is another one now; new ones may
// connect, and are dialled once SetAddresses names their addresses. This peer
// must be on it, at the index it has.
func (h *Host) SetMembers(members []Member) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return errClosed
	}
	next, self, err := newRoster(members, h.self.id, h.roster, h.cfg.Limits.Serves)
	if err != nil {
		return fmt.Errorf("p2p: %w", err)
	}
	if self != h.self {
		return fmt.Errorf("p2p: this peer has the index %d, not %d: an index is never changed", h.self.index, self.index)
	}
	old := h.roster
	h.roster = next
	for _, m := range old.members {
		if next.has(m) {
			continue
		}
		why := "it is not on the roster any more"
		if next.at[m.index] != nil {
			why = "its key was replaced"
		} else {
			h.kept.leave(m.index, h.unlearn)
		}
		m.leave()
		h.dropMemberLocked(m, why)
		h.noticeLocked(m, why)
	}
	h.meshLocked()
	for _, m := range next.members {
		if !old.has(m) {
			h.kept.join(m.index)
			h.dialLocked(m)
		}
	}
	h.linksChanged()
	h.judgeLater()
	return nil
}

// Expel disconnects a member and turns it away until SetMembers removes it or
// replaces its key.
func (h *Host) Expel(index int, why string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	m, err := h.otherLocked(index)
	if err != nil {
		return fmt.Errorf("p2p: expelling: %w", err)
	}
	m.expelled, m.why = true, why
	h.dropMemberLocked(m, why)
	h.noticeLocked(m, why)
	return nil
}

// otherLocked returns the member of that index, which must not be this peer.
func (h *Host) otherLocked(index int) (*member, error) {
	m := h.roster.at[index]
	if m == nil || m == h.self {
		return nil, fmt.Errorf("%d is not the index of another member", index)
	}
	return m, nil
}

// other is otherLocked for those without the lock.
func (h *Host) other(index int) (*member, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.otherLocked(index)
}

func (h *Host) dropMemberLocked(m *member, why string) {
	for _, s := range h.sessions {
		if s.member == m {
			h.dropLocked(s, why)
		}
	}
}

// dialLocked starts the dialler of a member that is new.
func (h *Host) dialLocked(m *member) {
	if m == h.self {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	m.leave = cancel
	if !h.spawnLocked(func() { h.dial(ctx, m) }) {
		cancel()
	}
}
