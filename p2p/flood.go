package p2p

import (
	"bytes"
	"errors"
	"fmt"
	"hash/maphash"
	"slices"
	"time"
)

const (
	stickyMessages = 32
	stickyBytes    = 256 << 10
	// keptGone is the number of signers that are no members whose sticky
	// messages are kept.
	keptGone = 64
)

// kept holds the messages that members which connect later may ask for, at
// most a number and a size of each signer's, sticky ones apart: those with the
// highest slots, ties to the larger ID. All peers thus drop the same ones, and
// none asks again for what it has dropped. Host.mu guards it.
type kept struct {
	plain, sticky keptBound
	floor         uint64 // plain messages of lower slots are not wanted any more
	byID          map[[32]byte]*keptMessage
	byData        map[uint64]*keptMessage // by a hash of the bytes, to save a Check
	seed          maphash.Seed
	of            map[keptKey]*keptOf
	gone          []int // signers of sticky messages that are no members, oldest first
	bytes         int
}

type keptBound struct{ count, bytes int }

type keptKey struct {
	from   int
	sticky bool
}

type keptOf struct {
	messages []*keptMessage
	bytes    int
	low      int // index of the lowest message, -1 if it is to be looked for
}

type keptMessage struct {
	data []byte
	raw  uint64
	meta Meta
	at   time.Duration // when it came
}

func (k *kept) init(maxCount, maxBytes, maxSticky int) {
	k.plain = keptBound{maxCount, maxBytes}
	k.sticky = keptBound{stickyMessages, maxSticky}
	k.byID = make(map[[32]byte]*keptMessage)
	k.byData = make(map[uint64]*keptMessage)
	k.seed = maphash.MakeSeed()
	k.of = make(map[keptKey]*keptOf)
}

func (k *kept) bound(sticky bool) keptBound {
	if sticky {
		return k.sticky
	}
	return k.plain
}

func (k *kept) size() (messages, size int) { return len(k.byID), k.bytes }

// below is the order in which a member's messages are dropped.
func (m *keptMessage) below(slot uint64, id [32]byte) bool {
	if m.meta.Slot != slot {
		return m.meta.Slot < slot
	}
	return bytes.Compare(m.meta.ID[:], id[:]) < 0
}

// lowest returns the member's message that is dropped first.
func (o *keptOf) lowest() int {
	if o.low < 0 {
		o.low = 0
		for i, m := range o.messages {
			if m.below(o.messages[o.low].meta.Slot, o.messages[o.low].meta.ID) {
				o.low = i
			}
		}
	}
	return o.low
}

// wants reports whether a message with this name would be kept, as far as can
// be told without its size.
func (k *kept) wants(e have) bool {
	if !e.sticky && e.slot < k.floor || k.byID[e.id] != nil {
		return false
	}
	o := k.of[keptKey{e.from, e.sticky}]
	if o == nil {
		return true
	}
	b := k.bound(e.sticky)
	full := len(o.messages) >= b.count || o.bytes >= b.bytes
	return !full || o.messages[o.lowest()].below(e.slot, e.id)
}

// add keeps a message, which must not be kept yet, and drops lower ones of the
// same signer as the bounds require. It returns false if it is the lowest itself.
func (k *kept) add(m *keptMessage, dropped func(*keptMessage)) bool {
	b := k.bound(m.meta.Sticky)
	if !m.meta.Sticky && m.meta.Slot < k.floor || len(m.data) > b.bytes {
		return false
	}
	key := keptKey{m.meta.From, m.meta.Sticky}
	o := k.of[key]
	if o == nil {
		o = &keptOf{}
		k.of[key] = o
	}
	for len(o.messages) >= b.count || o.bytes+len(m.data) > b.bytes {
		low := o.lowest()
		if !o.messages[low].below(m.meta.Slot, m.meta.ID) {
			return false
		}
		dropped(o.messages[low])
		k.remove(o, low)
	}
	o.messages = append(o.messages, m)
	o.low = -1
	o.bytes += len(m.data)
	k.bytes += len(m.data)
	k.byID[m.meta.ID] = m
	k.byData[m.raw] = m
	return true
}

func (k *kept) remove(o *keptOf, i int) {
	m := o.messages[i]
	last := len(o.messages) - 1
	o.messages[i] = o.messages[last]
	o.messages[last] = nil
	o.messages = o.messages[:last]
	o.low = -1
	o.bytes -= len(m.data)
	k.bytes -= len(m.data)
	delete(k.byID, m.meta.ID)
	if k.byData[m.raw] == m {
		delete(k.byData, m.raw)
	}
}

// forget drops all plain messages of lower slots, and from now on does not
// take any.
func (k *kept) forget(below uint64, dropped func(*keptMessage)) {
	k.floor = max(k.floor, below)
	for key, o := range k.of {
		if !key.sticky {
			k.drop(o, k.floor, dropped)
		}
	}
}

func (k *kept) drop(o *keptOf, below uint64, dropped func(*keptMessage)) {
	for j := len(o.messages) - 1; j >= 0; j-- {
		if o.messages[j].meta.Slot < below {
			dropped(o.messages[j])
			k.remove(o, j)
		}
	}
}

// clear drops all messages of one kind of a signer.
func (k *kept) clear(key keptKey, dropped func(*keptMessage)) {
	if o := k.of[key]; o != nil {
		for j := len(o.messages) - 1; j >= 0; j-- {
			dropped(o.messages[j])
			k.remove(o, j)
		}
		delete(k.of, key)
	}
}

// leave notes that a signer is no member (any more): its plain messages are
// dropped, its sticky ones stay until there are too many such signers.
func (k *kept) leave(from int, dropped func(*keptMessage)) {
	k.clear(keptKey{from, false}, dropped)
	if k.of[keptKey{from, true}] == nil || slices.Contains(k.gone, from) {
		return
	}
	if k.gone = append(k.gone, from); len(k.gone) > keptGone {
		k.clear(keptKey{k.gone[0], true}, dropped)
		k.gone = slices.Delete(k.gone, 0, 1)
	}
}

// join undoes leave.
func (k *kept) join(from int) {
	if i := slices.Index(k.gone, from); i >= 0 {
		k.gone = slices.Delete(k.gone, i, i+1)
	}
}

// find returns the kept message with exactly these bytes.
func (k *kept) find(data []byte) (*keptMessage, uint64) {
	raw := maphash.Bytes(k.seed, data)
	if m := k.byData[raw]; m != nil && bytes.Equal(m.data, data) {
		return m, raw
	}
	return nil, raw
}

// unlearn makes sessions hold nothing of a message that is no longer kept.
func (h *Host) unlearn(m *keptMessage) {
	for _, s := range h.sessions {
		delete(s.known, m)
	}
}

// Broadcast sends a message that this or another peer signed to all members
// that are connected, and keeps it for the others until Forget. The host keeps
// data, which must not change any more. The error is for messages that others
// would reject: too large a message, or no member's and not sticky.
func (h *Host) Broadcast(data []byte, meta Meta) error {
	if len(data) > h.cfg.Limits.MessageSize {
		return fmt.Errorf("p2p: a message of %d bytes: at most %d", len(data), h.cfg.Limits.MessageSize)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return errClosed
	}
	if meta.From < 0 || meta.From > MaxIndex || h.roster.at[meta.From] == nil && !meta.Sticky {
		return fmt.Errorf("p2p: a message from %d, which is not the index of a member", meta.From)
	}
	if h.kept.byID[meta.ID] != nil {
		return nil
	}
	_, raw := h.kept.find(data)
	m := &keptMessage{data: data, raw: raw, meta: meta, at: h.now()}
	keep := h.keepLocked(m)
	for _, o := range h.roster.members {
		if s := o.session(); s != nil {
			h.sendLocked(s, m, keep)
		}
	}
	return nil
}

func (h *Host) sendLocked(s *session, m *keptMessage, keep bool) {
	h.enqueueLocked(s, outFrame{kind: frameMessage, data: m.data})
	if keep && !s.dropped {
		s.known[m] = sent
	}
}

// keepLocked keeps a message, unless it is beyond what is kept of its signer.
func (h *Host) keepLocked(m *keptMessage) bool {
	keep := h.kept.add(m, h.unlearn)
	if keep && h.roster.at[m.meta.From] == nil {
		h.kept.leave(m.meta.From, h.unlearn)
	}
	return keep
}

// Message returns a message that is kept. It must not be changed.
func (h *Host) Message(id [32]byte) (data []byte, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	m := h.kept.byID[id]
	if m == nil {
		return nil, false
	}
	return m.data, true
}

// Forget drops the kept messages of slots below the given one, and all such
// messages that come later, except sticky ones.
func (h *Host) Forget(belowSlot uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.kept.forget(belowSlot, h.unlearn)
}

// receive checks a message, hands it over if it is new, and passes it on to
// those members that have no connection to its signer. One that cannot be
// judged yet is held; tries says how often it was before. Useful is false where
// checking it was in vain.
func (h *Host) receive(s *session, data []byte, tries int) (useful bool) {
	h.mu.Lock()
	if s.dropped && s.member.turnedAway(time.Now()) {
		h.mu.Unlock() // it is not heard any more, whatever is under way
		return false
	}
	old, raw := h.kept.find(data)
	if old != nil {
		h.counts.duplicates.Add(1)
		s.knows(old)
		h.cameLocked(s, old, false)
	}
	h.mu.Unlock()
	if old != nil {
		return true // it cost little
	}
	meta, err := h.cfg.Check(data)
	if errors.Is(err, ErrNotYet) {
		h.mu.Lock()
		h.holdLocked(s, data, tries)
		h.mu.Unlock()
		return false
	}
	if err == nil && (meta.From < 0 || meta.From > MaxIndex) {
		err = fmt.Errorf("signed by %d, which is no index", meta.From)
	}
	if err != nil {
		h.counts.bad.Add(1)
		h.blame(s.member, fmt.Sprintf("a message that fails its check: %v", err))
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if old := h.kept.byID[meta.ID]; old != nil {
		h.counts.duplicates.Add(1)
		s.knows(old)
		return true // two had it at once
	}
	signer := h.roster.at[meta.From]
	if signer == nil && !meta.Sticky && tries < strangerTries {
		h.holdLocked(s, data, tries) // of someone who is about to join, or has left
		return false
	}
	m := &keptMessage{data: data, raw: raw, meta: meta, at: h.now()}
	if h.closed || signer == nil && !meta.Sticky || !h.kept.wants(have{meta.ID, meta.From, meta.Slot, meta.Sticky}) {
		// Not passed on either: else two peers could send it back and forth.
		h.counts.stale.Add(1)
		return false
	}
	signed := &h.others
	if signer != nil {
		signed = &signer.signed
	}
	if !signed.take(m.at, 1, h.cfg.Limits.Rate, h.cfg.Limits.Burst) {
		if s.member == signer {
			h.counts.flood.Add(1)
			h.blameLocked(signer, fmt.Sprintf("more than %d messages a second", h.cfg.Limits.Rate))
		} else {
			h.counts.floodRelayed.Add(1)
		}
		return false
	}
	if !h.keepLocked(m) {
		signed.spent-- // an old one that someone sends again is not its signer's fault
		h.counts.stale.Add(1)
		return false
	}
	s.knows(m)
	h.cameLocked(s, m, true)
	h.counts.delivered.Add(1)
	h.events.put(Message{Data: data, Meta: meta})
	for _, o := range h.roster.members {
		t := o.session()
		if t == nil || o == s.member || o.index == meta.From || t.known[m] != 0 || !o.near {
			continue
		}
		if t.peers == nil || !t.peers.has(meta.From) {
			h.passLocked(t, m)
		}
	}
	return true
}

// Messages that cannot be judged yet are held, of each connection so many.
const (
	heldMessages  = 64
	heldBytes     = 256 << 10
	strangerTries = 16
)

type heldMessage struct {
	data  []byte
	tries int
}

// holdLocked puts a message aside until its roster may be known. Beyond the
// bounds the oldest are dropped, and asked for again later.
func (h *Host) holdLocked(s *session, data []byte, tries int) {
	if s.dropped {
		return
	}
	if tries == 0 {
		h.counts.notYet.Add(1)
	}
	s.held = append(s.held, heldMessage{data, tries})
	s.heldBytes += len(data)
	for len(s.held) > heldMessages || s.heldBytes > max(heldBytes, h.cfg.Limits.MessageSize) {
		h.counts.notYetLost.Add(1)
		s.lost = true
		s.heldBytes -= len(s.held[0].data)
		s.held = slices.Delete(s.held, 0, 1)
	}
}

// judgeLater makes judge look at what is held soon.
func (h *Host) judgeLater() {
	select {
	case h.later <- struct{}{}:
	default:
	}
}

// judge takes held messages whose roster has become known.
func (h *Host) judge() {
	type held struct {
		from *session
		heldMessage
	}
	var all []held
	for {
		select {
		case <-h.later:
		case <-h.stop:
			return
		}
		h.mu.Lock()
		for _, s := range h.sessions {
			for _, m := range s.held {
				all = append(all, held{s, m})
			}
			s.held, s.heldBytes = nil, 0
		}
		h.mu.Unlock()
		for _, m := range all {
			h.receive(m.from, m.data, m.tries+1)
		}
		clear(all)
		all = all[:0]
	}
}

func (s *session) knows(m *keptMessage) {
	if !s.dropped {
		s.known[m] = sent
	}
}

// heartbeat notes whom a member is connected to. Of those it has lost it may
// lack messages, which are offered to it at once. The bitmap's length is the
// sender's: rosters may differ while they change.
func (h *Host) heartbeat(s *session, peers bitset) {
	h.mu.Lock()
	defer h.mu.Unlock()
	lost := s.peers == nil
	for _, m := range h.roster.members {
		lost = lost || s.peers.has(m.index) && !peers.has(m.index)
	}
	s.peers = append(s.peers[:0], peers...)
	if lost {
		h.offerLocked(s, 0)
	}
}

// offerLocked names the kept messages that the other side is not known to
// have, once in a session. Those younger than age may still be under way to it.
func (h *Host) offerLocked(s *session, age time.Duration) {
	if !s.up {
		return
	}
	var list []byte
	now := h.now()
	for _, sticky := range [2]bool{true, false} {
		for key, o := range h.kept.of {
			if key.sticky != sticky {
				continue
			}
			for _, m := range o.messages {
				if s.known[m] != 0 || now-m.at < age {
					continue
				}
				s.known[m] = offered
				list = have{m.meta.ID, m.meta.From, m.meta.Slot, sticky}.append(list)
				if len(list) == maxEntries*haveEntry {
					h.enqueueLocked(s, outFrame{kind: frameHave, data: list})
					list = nil
				}
				if s.dropped {
					return
				}
			}
		}
	}
	if len(list) > 0 {
		h.enqueueLocked(s, outFrame{kind: frameHave, data: list})
	}
}

// againBeats is the least number of heartbeat intervals from one offer of
// everything to the next.
const againBeats = 32

// offerAgain notes that the other side dropped messages that it could not judge
// and wants everything offered once more. That is done at a heartbeat, and no
// more often than it could have the same by connecting again.
func (h *Host) offerAgain(s *session) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s.offerAll = true
}

func (h *Host) offerAllLocked(s *session) {
	if now := h.now(); s.offerAll && now-s.offered >= againBeats*h.cfg.Heartbeat {
		s.offerAll, s.offered = false, now
		clear(s.known)
	}
}

// lacking asks for those of the offered messages that are not here.
func (h *Host) lacking(s *session, offers []have) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var list []byte
	strangers := 0
	for _, e := range offers {
		if m := h.kept.byID[e.id]; m != nil {
			s.knows(m)
			continue
		}
		if !h.kept.wants(e) {
			continue
		}
		if h.roster.at[e.from] == nil {
			if strangers++; strangers > heldMessages {
				continue
			}
		}
		list = append(list, e.id[:]...)
	}
	if len(list) > 0 {
		h.enqueueLocked(s, outFrame{kind: frameWant, data: list})
		h.muteLocked(s, false)
	}
}

// answer sends the messages that the other side asks for, each once in a
// session: asking is cheap, a message is not.
func (h *Host) answer(s *session, ids [][32]byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s.dropped {
		return
	}
	for _, id := range ids {
		m := h.kept.byID[id]
		if m == nil || s.known[m] == sent {
			continue
		}
		if len(s.wanted) >= h.cfg.Limits.Queue {
			delete(s.known, m) // offered again at the next heartbeat
			continue
		}
		s.known[m] = sent
		s.wanted = append(s.wanted, m)
	}
	s.poke()
}
