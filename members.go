package spirt

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spirt-ml/spirt/internal/membership"
	"github.com/spirt-ml/spirt/p2p"
)

// MemberInfo is what a run folder tells of one member of its job.
type MemberInfo struct {
	Peer        int      `json:"peer"` // from 1
	Name        string   `json:"name,omitempty"`
	ID          string   `json:"id"`
	Addresses   []string `json:"addresses"`
	Minibatches int      `json:"minibatches"` // in each round
	Private     bool     `json:"private"`     // trains on data of its own
	Own         bool     `json:"own"`         // its folder is here
	// State is "connected", "lost" or "expelled" as the peer of this folder saw
	// it last, "" if it did not; Seen is when.
	State string     `json:"state,omitempty"`
	Seen  *time.Time `json:"seen,omitempty"`
	// Round is the last round that has its average.
	Round uint64 `json:"round"`
}

// MembersInfo is what a run folder tells of its job's members.
type MembersInfo struct {
	Job     string       `json:"job"`
	Epoch   uint64       `json:"epoch"` // of the latest roster
	Started bool         `json:"started"`
	Needed  int          `json:"needed"` // members with which training starts
	Members []MemberInfo `json:"members"`
}

// Members lists the members of the job in a run folder.
func Members(run string) (MembersInfo, error) {
	job, rosters, err := loadJob(run)
	if err != nil {
		return MembersInfo{}, err
	}
	latest, start := rosters.latest()
	if latest == nil {
		return MembersInfo{}, fmt.Errorf("there is no roster in %s", filepath.Join(run, rostersDir))
	}
	info := MembersInfo{Job: rosters.job.String(), Epoch: latest.Epoch, Started: start != nil, Needed: job.Peers}
	own := ownPeers(run, latest)
	contacts := contactsOf(run, rosters)
	at := map[int]int{}
	for _, m := range latest.Members {
		id, err := p2p.ID(m.Key)
		if err != nil {
			return MembersInfo{}, err
		}
		x := MemberInfo{Peer: int(m.Index) + 1, Name: m.Name, ID: string(id), Addresses: []string{}, Minibatches: int(m.Minibatches), Private: m.Private}
		if x.Minibatches == 0 {
			x.Minibatches = job.BatchesPerRound
		}
		for _, c := range contacts {
			if c.Key.Equal(m.Key) {
				x.Addresses = short(c.Addresses)
			}
		}
		x.Own = slices.ContainsFunc(own, func(o membership.Member) bool { return o.Index == m.Index })
		at[x.Peer] = len(info.Members)
		info.Members = append(info.Members, x)
	}
	return info, recentEvents(filepath.Join(run, eventsFile), func(e Event) {
		switch e.Event {
		case "peer":
			if i, ok := at[e.Peer]; ok && e.By != 0 && info.Members[i].State != "expelled" { // which is for good
				info.Members[i].State, info.Members[i].Seen = e.State, &e.Time
			}
		case "round":
			for _, n := range e.Members {
				if i, ok := at[n]; ok && e.Round > info.Members[i].Round {
					info.Members[i].Round = e.Round
				}
			}
		}
	})
}

// recentEvents calls f with the events at the end of a log, of 4 MiB at most.
func recentEvents(path string, f func(Event)) error {
	const most = 4 << 20
	file, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	cut := info.Size() > most
	if cut {
		if _, err := file.Seek(-most, io.SeekEnd); err != nil {
			return err
		}
	}
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 1<<20)
	for first := true; lines.Scan(); first = false {
		var e Event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			if first && cut {
				continue
			}
			return nil // it is being written
		}
		f(e)
	}
	return lines.Err()
}

// findMember returns the member that a person means by its number, its name or
// its peer ID.
func findMember(r *membership.Roster, who string) (membership.Member, error) {
	var found []membership.Member
	for _, m := range r.Members {
		id, err := p2p.ID(m.Key)
		if err == nil && string(id) == who || strconv.Itoa(int(m.Index)+1) == who || m.Name == who && who != "" {
			found = append(found, m)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return membership.Member{}, &UsageError{fmt.Errorf("no member %q: `spirt peers` lists their numbers, names and IDs", who)}
	}
	return membership.Member{}, &UsageError{fmt.Errorf("%q means several members: name one by its ID", who)}
}

// withAdmin changes the roster of a run folder by its admin key.
func withAdmin(run string, change func(a *admin, r *membership.Roster) (bool, error)) error {
	job, rosters, err := loadJob(run)
	if err != nil {
		return err
	}
	a, err := openAdmin(run, job, rosters)
	if err != nil {
		return err
	}
	if a == nil {
		return errNoAdmin(run)
	}
	return a.change(func(r *membership.Roster) (bool, error) { return change(a, r) })
}

// Expel takes a member off the roster. Who names it by number, name or ID. A
// running peer of the folder tells the others; training goes on without the
// member when a round has agreed on the roster.
func Expel(run, who string) (MemberInfo, error) {
	var out MemberInfo
	return out, withAdmin(run, func(_ *admin, r *membership.Roster) (bool, error) {
		m, err := findMember(r, who)
		if err != nil {
			return false, err
		}
		if len(r.Members) == 1 {
			return false, &UsageError{errors.New("it is the last member")}
		}
		out = MemberInfo{Peer: int(m.Index) + 1, Name: m.Name}
		return r.Remove(m.Index), nil
	})
}

// Emergency signs a roster of only the members named, without asking whether
// the others agree: for when most are gone for good. It can contradict what
// they make final among themselves, so nobody should sign one who is not sure.
func Emergency(run string, keep []string) error {
	return withAdmin(run, func(a *admin, r *membership.Roster) (bool, error) {
		if _, start := a.rosters.latest(); start == nil {
			return false, &UsageError{errors.New("training has not started: `spirt expel` takes members off one by one")}
		}
		kept := map[uint16]bool{}
		for _, who := range keep {
			m, err := findMember(r, who)
			if err != nil {
				return false, err
			}
			kept[m.Index] = true
		}
		if len(kept) == 0 {
			return false, &UsageError{errors.New("name the members that are left with --keep")}
		}
		if len(kept) == len(r.Members) {
			return false, &UsageError{errors.New("that is the whole roster: there is nothing to change")}
		}
		r.Emergency = true
		r.Members = slices.DeleteFunc(slices.Clone(r.Members), func(m membership.Member) bool { return !kept[m.Index] })
		return true, nil
	})
}

// Leave takes the peer of a run folder off the roster, and returns when that is
// signed.
func Leave(ctx context.Context, run string, progress func(string)) error {
	return petition(ctx, run, progress, func(dir string, key ed25519.PrivateKey, p *membership.Petition) (func(*membership.Roster) bool, []byte, error) {
		p.Kind = membership.Leave
		request, err := p.Sign(key, nil)
		return func(r *membership.Roster) bool { _, ok := r.Find(p.Key); return !ok }, request, err
	})
}

// RotateKey replaces the key of the peer of a run folder, and returns when that
// is signed. A running peer goes on with the new key by itself.
func RotateKey(ctx context.Context, run string, progress func(string)) error {
	return petition(ctx, run, progress, func(dir string, key ed25519.PrivateKey, p *membership.Petition) (func(*membership.Roster) bool, []byte, error) {
		path := filepath.Join(dir, nextKeyFile)
		next, err := p2p.LoadKey(path)
		if errors.Is(err, os.ErrNotExist) {
			if next, err = p2p.NewKey(); err == nil {
				err = p2p.WriteKey(path, next)
			}
		}
		if err != nil {
			return nil, nil, err
		}
		p.Kind = membership.Rekey
		request, err := p.Sign(next, key)
		return func(r *membership.Roster) bool { _, ok := r.Find(p.Key); return ok }, request, err
	})
}

// petition has those who hold an admin key change the roster for the peer of a
// run folder: this folder's key, or other members by asking them.
func petition(ctx context.Context, run string, progress func(string), prepare func(dir string, key ed25519.PrivateKey, p *membership.Petition) (done func(*membership.Roster) bool, request []byte, err error)) error {
	job, rosters, err := loadJob(run)
	if err != nil {
		return err
	}
	n, err := OwnPeer(run)
	if err != nil {
		return err
	}
	ids, err := loadIdentities(run, n, rosters)
	if err != nil {
		return err
	}
	p := membership.Petition{Job: rosters.job}
	done, request, err := prepare(peerDir(run, n), ids.key, &p)
	if err != nil {
		return err
	}
	a, err := openAdmin(run, job, rosters)
	if err != nil {
		return err
	}
	if a != nil {
		return a.grant(&p, time.Now())
	}
	var at []string
	for _, c := range contactsOf(run, rosters) {
		if id, err := p2p.ID(c.Key); err == nil && !c.Key.Equal(ids.key.Public()) {
			at = append(at, dialable(id, c.Addresses)...)
		}
	}
	if len(at) == 0 {
		return errors.New("no address of another member is known: run `spirt peer` on this folder once, or have an admin run `spirt expel`")
	}
	for waiting := false; ; {
		reply, err := p2p.Ask(ctx, ids.key, at[:min(len(at), 64)], rosters.job, request)
		if err == nil {
			var answer *membership.Answer
			if answer, err = membership.DecodeAnswer(reply); err != nil {
				return err
			}
			if answer.Refused != "" {
				return fmt.Errorf("refused: %s", answer.Refused)
			}
			for _, b := range answer.Rosters {
				if r, err := membership.DecodeRoster(b); err == nil {
					_, _ = rosters.add(r) // what matters is below
				}
			}
		}
		if _, e := rosters.rescan(); e != nil {
			return e
		}
		if latest, _ := rosters.latest(); done(latest) {
			return nil
		}
		if err != nil && !strings.Contains(err.Error(), "no member") {
			return fmt.Errorf("no other member answers; is one of them running? %w", err)
		}
		if !waiting && progress != nil {
			waiting = true
			progress("waiting for a peer that has the admin key")
		}
		if err := wait(ctx, askEvery); err != nil {
			return ErrInterrupted
		}
	}
}
