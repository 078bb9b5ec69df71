package p2p

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/core/sec"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
)

const (
	dialTime = 5 * time.Second // one attempt, handshake included
	dialMin  = 50 * time.Millisecond
	dialMax  = 5 * time.Second
)

// dial keeps one member connected while that is wanted and it has addresses: it tries at once,
// then after a back-off that doubles, with jitter. New addresses and the loss
// of a connection that lasted start the back-off again.
func (h *Host) dial(ctx context.Context, m *member) {
	var backoff time.Duration
	for {
		h.mu.Lock()
		if m.fresh {
			backoff, m.fresh = 0, false
		}
		addrs, refused := m.addrs, time.Until(m.refused)
		idle := len(addrs) == 0 || !h.wantsLocked(m) || h.hasSessionLocked(m) || h.closed
		h.mu.Unlock()

		wait := time.Duration(-1) // until poked
		if !idle {
			wait = backoff/2 + rand.N(backoff/2+1)
			if backoff == 0 && h.self.index > m.index {
				// Both sides often learn of each other at once. One goes first,
				// which saves the handshake of a second connection.
				wait = 2*dialMin + rand.N(2*dialMin)
			}
			wait = max(wait, refused)
		}
		if poked := pause(ctx, wait, m.wake); ctx.Err() != nil {
			return
		} else if poked {
			continue
		}
		backoff = min(dialMax, max(dialMin, 2*backoff))

		store := h.net.swarm.Peerstore()
		store.ClearAddrs(m.id)
		store.AddAddrs(m.id, addrs, peerstore.PermanentAddrTTL)
		h.net.swarm.Backoff().Clear(m.id) // it counts in minutes; the back-off here is enough
		dialCtx, cancel := context.WithTimeout(ctx, dialTime)
		_, err := h.net.swarm.DialPeer(dialCtx, m.id)
		cancel()
		if err != nil && ctx.Err() == nil {
			h.dialFailed(m, err)
		}
	}
}

// pause waits for d, or without end if d is negative, and reports whether wake
// ended it.
func pause(ctx context.Context, d time.Duration, wake <-chan struct{}) (poked bool) {
	var over <-chan time.Time
	if d >= 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		over = t.C
	}
	select {
	case <-over:
		return false
	case <-wake:
		return true
	case <-ctx.Done():
		return false
	}
}

// hasSessionLocked reports whether there is a connection to m, up or about to
// be.
func (h *Host) hasSessionLocked(m *member) bool {
	if len(m.sessions) > 0 {
		return true
	}
	for _, s := range h.sessions {
		if s.member == m && !s.dropped {
			return true
		}
	}
	return false
}

// dialFailed reports an address that someone else answers at.
func (h *Host) dialFailed(m *member, err error) {
	h.cfg.Logger.Debug("p2p: dialling", "member", m.index, "err", err)
	var all *swarm.DialError
	if !errors.As(err, &all) {
		return
	}
	for i := range all.DialErrors {
		var other sec.ErrPeerIDMismatch
		if errors.As(all.DialErrors[i].Cause, &other) {
			h.reportRefused(other.Actual, all.DialErrors[i].Address,
				fmt.Sprintf("it answers at an address of member %d, %s", m.index, m.name))
		}
	}
}
