package spirt

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spirt-ml/spirt/internal/membership"
	"github.com/spirt-ml/spirt/internal/round"
	"github.com/spirt-ml/spirt/p2p"
)

// errNewKey ends a peer whose key was replaced: it is opened again with the
// new one.
var errNewKey = errors.New("the key was replaced")

// ErrLeft is returned by RunPeer when the peer is no member of the job any
// more.
var ErrLeft = errors.New("this peer is not on the roster of the job any more: to take part again, join with another folder")

var errExpelled = errors.New("this peer was expelled: there is a proof that its key signed what no honest peer signs; was its folder copied, or restored from a backup?")

// lobby waits for the roster that training starts under, and returns what
// happened meanwhile.
func (p *peer) lobby(ctx context.Context) (pending []p2p.Event, err error) {
	p.loop.told = map[int]int{}
	told := 0
	for {
		latest, start := p.ids.rosters.latest()
		if _, ok := latest.Member(uint16(p.n - 1)); !ok {
			return nil, ErrLeft
		}
		if err := p.checkKey(); err != nil {
			return nil, err
		}
		if err := p.setMembers(); err != nil {
			return nil, err
		}
		p.spread()
		if start != nil {
			p.ids.roster = start.Hash()
			return pending, nil
		}
		if told != len(latest.Members) {
			told = len(latest.Members)
			e := Event{Event: "lobby"}
			e.Message = fmt.Sprintf("%d of %d members are there; training starts with the last", told, p.job.Peers)
			for _, m := range latest.Members {
				e.Members = append(e.Members, int(m.Index)+1)
			}
			p.emit(e)
			p.log.Info(e.Message)
		}
		for changed := false; !changed; {
			select {
			case <-ctx.Done():
				return nil, ErrInterrupted
			case <-p.ids.rosters.changed:
				changed = true
			case petition := <-p.relayed:
				p.tell(p.standing(), round.Petition{Data: petition})
			case e := <-p.host.Events():
				taken, err := p.lobbyEvent(e)
				if err != nil {
					return nil, err
				}
				if !taken && len(pending) < maxOpened {
					pending = append(pending, e)
				}
			}
		}
	}
}

// lobbyEvent handles what needs no machine, and reports whether it did.
func (p *peer) lobbyEvent(e p2p.Event) (bool, error) {
	m, ok := e.(p2p.Message)
	if !ok {
		if _, ok := e.(p2p.Connected); ok {
			p.greet()
		}
		return false, nil
	}
	opened, err := p.take(m)
	if err != nil {
		return false, fmt.Errorf("a message that was accepted before: %w", err)
	}
	return p.hosted(opened), nil
}

// setMembers tells the host who may connect. A peer that is on no roster in
// force any more leaves it as it is: it ends soon.
func (p *peer) setMembers() error {
	members := p.memberKeys()
	if !slices.ContainsFunc(members, func(m p2p.Member) bool { return m.Index == p.n-1 }) {
		return nil
	}
	return p.host.SetMembers(members)
}

// hosted handles messages that are not the machine's, and reports whether it
// was one.
func (p *peer) hosted(m round.Message) bool {
	switch b := m.Body.(type) {
	case round.RosterNotice: // check has kept it
	case round.Contact:
		p.contact(int(m.From), b.Addresses)
	case round.Petition:
		if p.petitions.admin != nil {
			p.petitioned(b.Data)
		}
	default:
		return false
	}
	return true
}

// petitioned decides on a petition that another member passed on.
func (p *peer) petitioned(data []byte) {
	petition, err := membership.DecodePetition(data)
	if err == nil {
		err = p.petitions.admin.grant(petition, time.Now())
	}
	if err != nil {
		p.log.Warn("a petition that was passed on is refused", "err", err)
	}
}

// contact notes where a member may be reached.
func (p *peer) contact(index int, addresses []string) {
	latest, _ := p.ids.rosters.latest()
	m, ok := latest.Member(uint16(index))
	if !ok || index == p.n-1 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reachLocked(m, addresses)
}

// reachLocked tells the host and the address book of a member's addresses.
func (p *peer) reachLocked(m membership.Member, addresses []string) {
	id, err := p2p.ID(m.Key)
	if err != nil || slices.Equal(p.book[id], addresses) || len(addresses) == 0 {
		return
	}
	if err := p.host.SetAddresses(int(m.Index), addresses); err != nil {
		p.log.Warn("an address that was told is of no use", "peer", m.Index+1, "err", err)
		return
	}
	p.book[id] = addresses
	if err := p.book.write(p.dir); err != nil {
		p.log.Warn("the addresses are not kept", "err", err)
	}
}

// dialBook tells the host of the addresses that are known from before.
func (p *peer) dialBook() {
	latest, _ := p.ids.rosters.latest()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, m := range latest.Members {
		id, err := p2p.ID(m.Key)
		if at := p.book[id]; err == nil && len(at) > 0 && int(m.Index) != p.n-1 {
			_ = p.host.SetAddresses(int(m.Index), at) // others tell again
		}
	}
}

// found is told of an address on the local network, whose peer may be anyone.
func (p *peer) found(address string) {
	latest, _ := p.ids.rosters.latest()
	for _, m := range latest.Members {
		id, err := p2p.ID(m.Key)
		if err != nil || int(m.Index) == p.n-1 || !endsWithPeer(address, id) {
			continue
		}
		p.mu.Lock()
		if known := p.book[id]; !slices.Contains(known, address) {
			p.reachLocked(m, append([]string{address}, known[:min(len(known), maxReachable)]...))
		}
		p.mu.Unlock()
	}
}

func endsWithPeer(address string, id p2p.PeerID) bool {
	suffix := "/p2p/" + string(id)
	return len(address) > len(suffix) && address[len(address)-len(suffix):] == suffix
}

// greet tells who has connected what it may not know: where this peer may be
// reached, and the last rosters. Others that know already drop it.
func (p *peer) greet() {
	p.tellContact()
	all := p.ids.rosters.all()
	for _, r := range all[max(0, len(all)-8):] {
		p.notify(r)
	}
}

// tellContact tells the others where this peer may be reached.
func (p *peer) tellContact() {
	if len(p.reachable) > 0 {
		p.tell(p.standing(), round.Contact{Addresses: p.reachable})
	}
}

// spread tells the others of all rosters that were not told yet.
func (p *peer) spread() {
	for _, r := range p.ids.rosters.all() {
		if id := r.Hash(); !p.told[id] {
			p.told[id] = true
			p.notify(r)
		}
	}
}

// notify floods a roster, signed as a member of the one before it: whoever
// lacks this one knows that.
func (p *peer) notify(r *membership.Roster) {
	before := p.ids.rosters.get(r.Previous)
	if before == nil {
		return // of epoch 0: nobody takes part without it
	}
	if m, ok := before.Member(uint16(p.n - 1)); ok && p.signer(m.Key) != nil {
		p.tell(r.Previous, round.RosterNotice{Data: r.Encode()})
	}
}

// standing is the newest roster on which this peer is with a key of its own.
func (p *peer) standing() round.Hash {
	all := p.ids.rosters.all()
	for _, r := range slices.Backward(all) {
		if m, ok := r.Member(uint16(p.n - 1)); ok && p.signer(m.Key) != nil {
			return r.Hash()
		}
	}
	return round.Hash{}
}

// tell floods a message that is bound to no slot. It is kept as long as those
// of the slot after the head.
func (p *peer) tell(roster round.Hash, b round.Body) {
	m := round.Message{From: round.Peer(p.n - 1), Slot: p.loop.head.Slot + 1, Roster: roster, Body: b}
	if err := p.broadcast(m); err != nil {
		p.log.Warn("a message could not be sent", "type", m.Type(), "err", err)
	}
}

// signer returns this peer's private key that has the public half, nil if it
// has none.
func (p *peer) signer(public ed25519.PublicKey) ed25519.PrivateKey {
	for _, k := range []ed25519.PrivateKey{p.ids.key, p.ids.old} {
		if k != nil && public.Equal(k.Public()) {
			return k
		}
	}
	return nil
}

// signerUnder returns the key to sign with as a member of a roster.
func (p *peer) signerUnder(roster round.Hash) ed25519.PrivateKey {
	if keys, ok := p.ids.rosters.members(roster); ok && p.n <= len(keys) {
		if k := p.signer(keys[p.n-1]); k != nil {
			return k
		}
	}
	return p.ids.key
}

// catchUp asks members that were known for the rosters that were signed while
// this peer was away. They also come with those who connect, if not too many.
func (p *peer) catchUp(ctx context.Context) {
	latest, _ := p.ids.rosters.latest()
	var at []string
	for _, m := range latest.Members {
		id, err := p2p.ID(m.Key)
		if err != nil || int(m.Index) == p.n-1 {
			continue
		}
		p.mu.Lock()
		at = append(at, dialable(id, p.book[id])...)
		p.mu.Unlock()
	}
	if len(at) == 0 {
		return
	}
	petition := membership.Petition{Job: p.ids.job, Kind: membership.Follow, From: latest.Epoch + 1}
	request, err := petition.Sign(p.ids.key, nil)
	if err != nil {
		p.log.Error("asking for rosters", "err", err)
		return
	}
	reply, err := p2p.Ask(ctx, p.ids.key, at[:min(len(at), 64)], p.ids.job, request)
	if err != nil {
		p.log.Info("no member was asked for rosters", "err", err)
		return
	}
	answer, err := membership.DecodeAnswer(reply)
	if err != nil {
		p.log.Warn("an answer about rosters", "err", err)
		return
	}
	for _, b := range answer.Rosters {
		r, err := membership.DecodeRoster(b)
		if err == nil {
			_, err = p.ids.rosters.add(r)
		}
		if err != nil {
			p.log.Warn("a roster of an answer", "err", err)
			return
		}
	}
}

// guests answers a stranger, or a member that lacks rosters.
func (p *peer) guests(_ context.Context, remote p2p.PeerID, request []byte) ([]byte, error) {
	a, err := p.petitions.answer(remote, request)
	if err != nil {
		return nil, err
	}
	if a.Refused != "" {
		p.log.Warn("a petition is refused", "from", remote, "why", a.Refused)
	}
	return a.Encode(), nil
}

// relay hands a stranger's petition to the goroutine of the loop, which passes
// it on. The stranger asks again if it is dropped.
func (p *peer) relay(petition []byte) {
	select {
	case p.relayed <- petition:
	default:
	}
}

// checkKey returns errNewKey where the roster has replaced this peer's key.
func (p *peer) checkKey() error {
	latest, _ := p.ids.rosters.latest()
	m, ok := latest.Member(uint16(p.n - 1))
	if !ok || m.Key.Equal(p.ids.key.Public()) {
		return nil
	}
	next, err := p2p.LoadKey(filepath.Join(p.dir, nextKeyFile))
	if err == nil && m.Key.Equal(next.Public()) {
		return errNewKey
	}
	return nil
}

// takeNewKey makes the next key of a peer its key, if the roster says so. It
// may be interrupted anywhere.
func takeNewKey(dir string, m membership.Member) error {
	at := func(name string) string { return filepath.Join(dir, name) }
	next, err := p2p.LoadKey(at(nextKeyFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !m.Key.Equal(next.Public()) {
		return nil // not signed yet
	}
	if err := os.Rename(at(keyFile), at(oldKeyFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return os.Rename(at(nextKeyFile), at(keyFile))
}
