package p2p

import (
	"bytes"
	"fmt"
	"hash/maphash"
	"time"
)

// kept holds the messages that members which connect later may ask for, at
// most a number and a size of each member's: those with the highest slots, ties
// to the larger ID. All peers thus drop the same ones, and none asks again for
// what it has dropped. Host.mu guards it.
type kept struct {
	maxCount, maxBytes int
	floor              uint64 // messages of lower slots are not wanted any more
	byID               map[[32]byte]*keptMessage
	byData             map[uint64]*keptMessage // by a hash of the bytes, to save a Check
	seed               maphash.Seed
	of                 []keptOf // by member
	bytes              int
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

func (k *kept) init(members, maxCount, maxBytes int) {
	k.maxCount, k.maxBytes = maxCount, maxBytes
	k.byID = make(map[[32]byte]*keptMessage)
	k.byData = make(map[uint64]*keptMessage)
	k.seed = maphash.MakeSeed()
	k.of = make([]keptOf, members)
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
	if e.slot < k.floor || k.byID[e.id] != nil {
		return false
	}
	o := &k.of[e.from]
	full := len(o.messages) >= k.maxCount || o.bytes >= k.maxBytes
	return !full || o.messages[o.lowest()].below(e.slot, e.id)
}

// add keeps a message, which must not be kept yet, and drops lower ones of the
// same member as the bounds require. It returns nil if it is the lowest itself.
func (k *kept) add(m *keptMessage, dropped func(*keptMessage)) bool {
	o := &k.of[m.meta.From]
	if m.meta.Slot < k.floor || len(m.data) > k.maxBytes {
		return false
	}
	for len(o.messages) >= k.maxCount || o.bytes+len(m.data) > k.maxBytes {
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

// forget drops all messages of lower slots, and from now on does not take any.
func (k *kept) forget(below uint64, dropped func(*keptMessage)) {
	k.floor = max(k.floor, below)
	for i := range k.of {
		o := &k.of[i]
		for j := len(o.messages) - 1; j >= 0; j-- {
			if o.messages[j].meta.Slot < k.floor {
				dropped(o.messages[j])
				k.remove(o, j)
			}
		}
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
// would reject: too large a message, or no member's.
func (h *Host) Broadcast(data []byte, meta Meta) error {
	if len(data) > h.cfg.Limits.MessageSize {
		return fmt.Errorf("p2p: a message of %d bytes: at most %d", len(data), h.cfg.Limits.MessageSize)
	}
	if meta.From < 0 || meta.From >= len(h.members) {
		return fmt.Errorf("p2p: a message from member %d of %d", meta.From, len(h.members))
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return errClosed
	}
	if h.kept.byID[meta.ID] != nil {
		return nil
	}
	_, raw := h.kept.find(data)
	m := &keptMessage{data: data, raw: raw, meta: meta, at: h.now()}
	keep := h.kept.add(m, h.unlearn)
	for _, o := range h.members {
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

// Forget drops the kept messages of slots below the given one, and all such
// messages that come later.
func (h *Host) Forget(belowSlot uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.kept.forget(belowSlot, h.unlearn)
}

// receive checks a message, hands it over if it is new, and passes it on to
// those members that have no connection to its signer.
func (h *Host) receive(s *session, data []byte) error {
	h.mu.Lock()
	old, raw := h.kept.find(data)
	if old != nil {
		h.counts.duplicates.Add(1)
		s.knows(old)
	}
	h.mu.Unlock()
	if old != nil {
		return nil
	}
	meta, err := h.cfg.Check(data)
	if err == nil && (meta.From < 0 || meta.From >= len(h.members)) {
		err = fmt.Errorf("signed by member %d of %d", meta.From, len(h.members))
	}
	if err != nil {
		h.counts.bad.Add(1)
		h.blame(s.member, fmt.Sprintf("a message that fails its check: %v", err))
		return nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if old := h.kept.byID[meta.ID]; old != nil {
		h.counts.duplicates.Add(1)
		s.knows(old)
		return nil
	}
	m := &keptMessage{data: data, raw: raw, meta: meta, at: h.now()}
	if h.closed || !h.kept.add(m, h.unlearn) {
		// Not passed on either: else two peers could send it back and forth.
		h.counts.stale.Add(1)
		return nil
	}
	s.knows(m)
	h.counts.delivered.Add(1)
	h.events.put(Message{Data: data, Meta: meta})
	for _, o := range h.members {
		t := o.session()
		if t == nil || o == s.member || o.index == meta.From || t.known[m] != 0 {
			continue
		}
		if t.peers == nil || !t.peers.has(meta.From) {
			h.sendLocked(t, m, true)
		}
	}
	return nil
}

func (s *session) knows(m *keptMessage) {
	if !s.dropped {
		s.known[m] = sent
	}
}

// heartbeat notes whom a member is connected to. Of those it has lost it may
// lack messages, which are offered to it at once.
func (h *Host) heartbeat(s *session, peers bitset) {
	h.mu.Lock()
	defer h.mu.Unlock()
	lost := s.peers == nil
	for i := range h.members {
		lost = lost || s.peers.has(i) && !peers.has(i)
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
	for i := range h.kept.of {
		for _, m := range h.kept.of[i].messages {
			if s.known[m] != 0 || now-m.at < age {
				continue
			}
			s.known[m] = offered
			list = have{m.meta.ID, m.meta.From, m.meta.Slot}.append(list)
			if len(list) == maxEntries*haveEntry {
				h.enqueueLocked(s, outFrame{kind: frameHave, data: list})
				list = nil
			}
			if s.dropped {
				return
			}
		}
	}
	if len(list) > 0 {
		h.enqueueLocked(s, outFrame{kind: frameHave, data: list})
	}
}

// lacking asks for those of the offered messages that are not here.
func (h *Host) lacking(s *session, offers []have) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var list []byte
	for _, e := range offers {
		if m := h.kept.byID[e.id]; m != nil {
			s.knows(m)
		} else if h.kept.wants(e) {
			list = append(list, e.id[:]...)
		}
	}
	if len(list) > 0 {
		h.enqueueLocked(s, outFrame{kind: frameWant, data: list})
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
