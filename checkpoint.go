package spirt

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spirt-ml/spirt/internal/round"
	"github.com/spirt-ml/spirt/p2p"
)

// What a peer has on disk of its chain: the states of some records, and its
// last vote.

// headName names the checkpoint that a peer leaves when it stops; those of the
// protocol have the names of their records.
const headName = "head"

const roundPrefix = "round-"

func checkpointName(r *round.Record) string {
	return fmt.Sprintf("%s%d-%s", roundPrefix, r.Height, r.ID().Short())
}

// restored is a checkpoint whose state is in the database again.
type restored struct {
	record  round.Record
	links   []round.Checkpoint
	pending *pendingValidation // nil: there was none
	name    string
}

// pendingValidation is the result of the model of a round that stands in an
// announcement after the checkpoint: the state that it is of is not kept.
type pendingValidation struct {
	Round  uint64           `json:"round"`
	Result round.Validation `json:"result"`
}

// recover loads all checkpoints of this peer, highest first. One that cannot
// be used is passed over with a warning, unless it is the only one.
func (p *peer) recover() ([]restored, error) {
	names, err := p.db.Checkpoints()
	if err != nil {
		return nil, err
	}
	var found []restored
	var errs []error
	for _, name := range names {
		if name != headName && !strings.HasPrefix(name, roundPrefix) {
			continue
		}
		r, err := p.recoverOne(name)
		if err != nil {
			p.log.Warn("a checkpoint cannot be used", "name", name, "err", err)
			errs = append(errs, err)
			continue
		}
		if !slices.ContainsFunc(found, func(f restored) bool { return f.record.ID() == r.record.ID() }) {
			found = append(found, r)
		}
	}
	if len(found) == 0 && len(errs) > 0 {
		return nil, fmt.Errorf("%w: remove %s, and this peer starts anew", errors.Join(errs...), filepath.Join(p.dir, databaseDir))
	}
	slices.SortFunc(found, func(a, b restored) int {
		return cmp.Or(cmp.Compare(b.record.Height, a.record.Height), cmp.Compare(b.name, a.name))
	})
	return found, nil
}

func (p *peer) recoverOne(name string) (r restored, err error) {
	meta, err := p.db.Recover(name)
	if err != nil {
		return r, err
	}
	r.name = name
	if err := json.Unmarshal([]byte(meta["record"]), &r.record); err != nil {
		return r, fmt.Errorf("the record in the checkpoint %s: %w", name, err)
	}
	if meta["job"] != p.ids.job.String() {
		return r, fmt.Errorf("the checkpoint %s in %s is of another job: remove it, or restore the job file", name, filepath.Join(p.dir, databaseDir))
	}
	if s := meta["links"]; s != "" {
		if err := json.Unmarshal([]byte(s), &r.links); err != nil {
			return r, fmt.Errorf("the links in the checkpoint %s: %w", name, err)
		}
	}
	if s := meta["validation"]; s != "" {
		if err := json.Unmarshal([]byte(s), &r.pending); err != nil {
			return r, fmt.Errorf("the validation in the checkpoint %s: %w", name, err)
		}
	}
	keys := p.checkpointKeys(name)
	model, state, err := p.store.keepState(r.record.Height, keys[0], keys[1])
	if err != nil {
		return r, fmt.Errorf("the checkpoint %s: %w", name, err)
	}
	if model != r.record.Model || state != r.record.State {
		return r, fmt.Errorf("the checkpoint %s in %s does not hold the state of its record", name, filepath.Join(p.dir, databaseDir))
	}
	return r, nil
}

// checkpoint writes a record's state to disk, durably. The state's bytes are
// taken now; the writing waits in the returned function, which is called once
// or not at all.
func (p *peer) checkpoint(name string, r round.Record, links []round.Checkpoint) (write func() error) {
	record, err := json.Marshal(r)
	l, lerr := json.Marshal(links)
	params, opt := p.store.stateKeys(r)
	keys := p.checkpointKeys(name)
	err = errors.Join(err, lerr, p.db.Copy(keys[0], params), p.db.Copy(keys[1], opt))
	meta := map[string]string{"record": string(record), "links": string(l), "job": p.ids.job.String()}
	v := p.pendingAt(&r)
	return func() error {
		if v != nil && err == nil {
			<-v.done // a few rounds at most: whoever goes on from here has the result too
			var pending []byte
			pending, err = json.Marshal(pendingValidation{Round: v.record.Height, Result: v.result})
			meta["validation"] = string(pending)
		}
		if err == nil {
			err = p.db.Checkpoint(name, keys, meta)
			for _, key := range keys {
				p.db.Delete(key)
			}
		}
		if err != nil {
			return fmt.Errorf("checkpoint of round %d: %w", r.Height, err)
		}
		return nil
	}
}

// checkpointKeys are where a checkpoint's parameters and optimizer state lie.
func (p *peer) checkpointKeys(name string) []string {
	return []string{p.store.key("checkpoint/" + name + "/parameters"), p.store.key("checkpoint/" + name + "/optimizer")}
}

// writeCheckpoint does what the machine asks for, one after the other; of those
// that wait only the newest is written.
func (p *peer) writeCheckpoint(ctx context.Context, a round.WriteCheckpoint) {
	l := &p.loop
	name := checkpointName(&a.Record)
	next := &pendingCheckpoint{id: a.ID, name: name, write: p.checkpoint(name, a.Record, a.Links)}
	if l.writing != "" {
		if old := l.waiting; old != nil && old.name != name {
			for _, key := range p.checkpointKeys(old.name) {
				p.db.Delete(key)
			}
		}
		l.waiting = next
		return
	}
	p.startCheckpoint(ctx, next)
}

type pendingCheckpoint struct {
	id    round.Hash
	name  string
	write func() error
}

func (p *peer) startCheckpoint(ctx context.Context, c *pendingCheckpoint) {
	p.loop.writing = c.name
	p.always(ctx, func() result {
		err := c.write()
		if err != nil {
			p.warn("%v", err) // the last one stands, and the next may succeed
			return result{event: written{}}
		}
		return result{event: written{id: c.id}}
	})
}

// written is this host's own event: a checkpoint is on disk, or failed.
type written struct {
	round.Timer
	id round.Hash
}

func (p *peer) checkpointWritten(ctx context.Context, w written) error {
	l := &p.loop
	l.writing = ""
	if next := l.waiting; next != nil {
		l.waiting = nil
		p.startCheckpoint(ctx, next)
	}
	if w.id == (round.Hash{}) {
		return nil
	}
	p.note(stepOnDisk, w.id.String())
	l.journal.rotate()
	return p.step(ctx, round.Checkpointed{Record: w.id})
}

// dropCheckpoints removes those that nothing needs any more.
func (p *peer) dropCheckpoints(keep []round.Hash) {
	l := &p.loop
	if slices.Equal(keep, l.onDisk) {
		return
	}
	l.onDisk = slices.Clone(keep)
	names, err := p.db.Checkpoints()
	if err != nil {
		p.log.Warn("listing checkpoints", "err", err)
		return
	}
	for _, name := range names {
		short, ours := strings.CutPrefix(name, roundPrefix)
		_, short, _ = strings.Cut(short, "-")
		needed := slices.ContainsFunc(keep, func(h round.Hash) bool { return h.Short() == short })
		if ours && !needed && name != l.writing {
			if err := p.db.RemoveCheckpoint(name); err != nil {
				p.log.Warn("an old checkpoint could not be removed", "name", name, "err", err)
			}
		}
	}
}

// voteFile is a peer's last vote, and the votes that justify its source.
type voteFile struct {
	Target round.Record `json:"target"`
	Votes  [][]byte     `json:"votes"` // envelopes
}

// maxVoteFile bounds it in bytes.
const maxVoteFile = 64 << 20

func (p *peer) votePath() string { return filepath.Join(p.dir, "vote.json") }

// readVote reads what a peer voted last; a peer that never did has no file.
func (p *peer) readVote() (v voteFile, err error) {
	b, err := readFile(p.votePath(), maxVoteFile)
	if errors.Is(err, os.ErrNotExist) {
		return v, nil
	}
	if err == nil {
		d := json.NewDecoder(bytes.NewReader(b))
		d.DisallowUnknownFields()
		err = d.Decode(&v)
	}
	if err == nil && v.Target.Height == 0 {
		err = errors.New("it names no record")
	}
	if err != nil {
		return v, fmt.Errorf("the last vote, %s: %w: without it this peer could vote twice; restore it or leave the job", p.votePath(), err)
	}
	return v, nil
}

// persistVote writes a vote to disk before it is sent.
func (p *peer) persistVote(ctx context.Context, a round.PersistVote) {
	v := voteFile{Target: a.Target}
	for _, id := range a.Certificate {
		if data, ok := p.host.Message(id); ok {
			v.Votes = append(v.Votes, bytes.Clone(data))
		}
	}
	p.always(ctx, func() result {
		b, err := json.Marshal(v)
		if err == nil {
			err = writeFileAtomic(p.votePath(), b, 0o644)
		}
		if err != nil {
			p.warn("no vote for round %d: %v", a.Target.Height, err)
			return result{event: round.Timer{}}
		}
		return result{event: round.VotePersisted{Target: a.Target.ID()}}
	})
}

// replayVotes gives the machine, and others, the votes of before a restart.
func (p *peer) replayVotes(ctx context.Context) error {
	for _, data := range p.vote.Votes {
		m, id, err := round.Open(data, p.ids.job, p.ids.rosters.members)
		if err != nil {
			p.log.Warn("a vote in the vote file is of no use", "err", err)
			continue
		}
		if err := p.host.Broadcast(data, p2p.Meta{ID: id, From: int(m.From), Slot: m.Slot, Sticky: true}); err != nil {
			p.log.Warn("a vote cannot be passed on", "err", err)
		}
		if err := p.step(ctx, round.Received{Message: m, ID: id}); err != nil {
			return err
		}
	}
	return nil
}

// accuse makes a proof of two messages that contradict each other.
func (p *peer) accuse(ctx context.Context, a round.Accuse) {
	p.always(ctx, func() result {
		first, ok1 := p.host.Message(a.A)
		second, ok2 := p.host.Message(a.B)
		if !ok1 || !ok2 {
			return result{event: round.Timer{}}
		}
		proof, err := round.NewProof(first, second, p.ids.job, p.ids.rosters.members)
		if err != nil {
			p.log.Warn("no proof", "peer", a.Peer+1, "err", err)
			return result{event: round.Timer{}}
		}
		return result{event: round.Evidence{Proof: proof}}
	})
}
