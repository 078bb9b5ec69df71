package spirt

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spirt-ml/spirt/bill"
	"github.com/spirt-ml/spirt/internal/round"
)

// A journal is what a peer notes of each step that it takes, so that it can go
// on after it was killed, at whatever step, and say where. docs/journal.md has
// the format. It is written but not synced: the page cache survives the process,
// and after a loss of power the newest checkpoint on disk counts anyway.
//
// It begins anew at each checkpoint, so it is short. What goes wrong with it
// never ends a run: the peer then goes on from its checkpoint, and its bill from
// what the journal had.
type journal struct {
	path string
	job  string
	f    *os.File
	size int64
	last entry // that began a round, for rotate
	step func(entry)
	fail func(err error) // told once
}

// entry is a line of a journal.
type entry struct {
	Time  time.Time `json:"time"`
	Step  string    `json:"step"`
	Slot  uint64    `json:"slot,omitempty"`
	Round uint64    `json:"round,omitempty"`

	Name   string             `json:"name,omitempty"`   // of a checkpoint, a body, a message
	Record *round.Record      `json:"record,omitempty"` // that became the head
	Links  []round.Checkpoint `json:"links,omitempty"`  // the checkpoints below it
	// What the peer has used since it first started, and for how long it has
	// trained.
	Used    *bill.Usage `json:"used,omitempty"`
	Elapsed int64       `json:"elapsed_ms,omitempty"`
}

// The steps of a journal, in the order of a round; those after adopt are taken
// beside the rounds.
const (
	stepCompute    = "compute"    // minibatches are handed to functions
	stepAverage    = "average"    // their average is in the database
	stepAnnounce   = "announce"   // it was told to the others
	stepFetch      = "fetch"      // another's average is asked for
	stepHeld       = "held"       // it is in the database, and checked
	stepBallot     = "ballot"     // the ballot was told
	stepApply      = "apply"      // aggregate and update begin
	stepApplied    = "applied"    // the new state is in the database
	stepRecord     = "record"     // the record was signed and told
	stepAdopt      = "adopt"      // it is the head: the round is over
	stepPursue     = "pursue"     // the state of another head is asked for
	stepState      = "state"      // it is in the database
	stepPersist    = "persist"    // the watermark is on disk
	stepCheckpoint = "checkpoint" // a state begins to go to disk
	stepOnDisk     = "on-disk"    // it is there
	stepVote       = "vote"       // a vote is on disk
	stepFinish     = "finish"     // the last record is reached
	stepModel      = "model"      // the model is in the run folder
	stepEnd        = "end"        // so is the last checkpoint
	stepStop       = "stop"       // the peer was asked to stop, and has left a checkpoint
)

// journalSteps are all of them.
var journalSteps = []string{
	stepCompute, stepAverage, stepAnnounce, stepFetch, stepHeld, stepBallot, stepApply, stepApplied, stepRecord, stepAdopt,
	stepPursue, stepState, stepPersist, stepCheckpoint, stepOnDisk, stepVote, stepFinish, stepModel, stepEnd, stepStop,
}

const (
	journalMagic   = "spirt journal 1 "
	maxJournalLine = 1 << 20
	maxJournal     = 16 << 20 // bytes; a journal that grows beyond is begun anew
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// past is what a journal says of the life before.
type past struct {
	entry         // the last step
	Head    entry // the last adopt; its Record is nil if there is none
	Entries int
}

// readJournal reads what it can of a peer's journal: up to the first line that
// is torn or damaged. A journal that is not there, or of another job, is empty.
func readJournal(path, job string) (past, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return past{}, nil
	}
	if err != nil {
		return past{}, fmt.Errorf("reading the journal: %w", err)
	}
	defer f.Close()
	return parseJournal(io.LimitReader(f, 2*maxJournal), job)
}

func parseJournal(r io.Reader, job string) (p past, err error) {
	in := bufio.NewReaderSize(r, 64<<10)
	line, err := readLine(in)
	switch {
	case errors.Is(err, io.EOF):
		return p, nil
	case err != nil:
		return p, err
	case line != journalMagic+job:
		return p, fmt.Errorf("the journal is of another job or version: it begins with %.80q", line)
	}
	for {
		line, err := readLine(in)
		if err != nil {
			return p, nil // what was torn did not happen
		}
		e, ok := parseEntry(line)
		if !ok {
			return p, nil
		}
		p.Entries++
		p.entry = e
		switch {
		case e.Record != nil || e.Used != nil && p.Head.Used == nil:
			p.Head = e
		case e.Used != nil:
			p.Head.Used, p.Head.Elapsed = e.Used, e.Elapsed
		}
	}
}

// readLine returns a line without its end. One without an end is torn.
func readLine(in *bufio.Reader) (string, error) {
	var line []byte
	for {
		b, err := in.ReadSlice('\n')
		if line = append(line, b...); len(line) > maxJournalLine {
			return "", fmt.Errorf("a line of the journal is longer than %d bytes", maxJournalLine)
		}
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		return string(bytes.TrimSuffix(line, []byte{'\n'})), err
	}
}

// appendEntry appends the line of an entry: the checksum of the rest, in
// hexadecimal, a space, and the entry as JSON.
func appendEntry(b []byte, e entry) ([]byte, error) {
	text, err := json.Marshal(e)
	if len(text) > maxJournalLine-16 { // nothing has been final for very long
		e.Record, e.Links = nil, nil // without its links it cannot be gone on from: the checkpoint counts
		text, err = json.Marshal(e)
	}
	if err != nil {
		return b, fmt.Errorf("encoding a step: %w", err)
	}
	b = fmt.Appendf(b, "%08x ", crc32.Checksum(text, castagnoli))
	return append(append(b, text...), '\n'), nil
}

func parseEntry(line string) (e entry, ok bool) {
	if len(line) < 10 || line[8] != ' ' {
		return e, false
	}
	sum, err := strconv.ParseUint(line[:8], 16, 32)
	if err != nil || uint32(sum) != crc32.Checksum([]byte(line[9:]), castagnoli) {
		return e, false
	}
	d := json.NewDecoder(bytes.NewReader([]byte(line[9:])))
	d.DisallowUnknownFields()
	return e, d.Decode(&e) == nil && e.Step != ""
}

// openJournal begins a journal anew, with what the one before ended with.
func openJournal(dir, job string, before past, fail func(error)) *journal {
	j := &journal{path: filepath.Join(dir, journalFile), job: job, last: before.Head, fail: fail}
	j.rotate()
	return j
}

// rotate begins the journal anew with its last head.
func (j *journal) rotate() {
	b := []byte(journalMagic + j.job + "\n")
	var err error
	if j.last.Step != "" {
		b, err = appendEntry(b, j.last)
	}
	if err == nil {
		err = writeFileAtomic(j.path, b, 0o644)
	}
	if err == nil {
		j.close()
		j.f, err = os.OpenFile(j.path, os.O_APPEND|os.O_WRONLY, 0o644)
	}
	j.size = int64(len(b))
	j.failed(err)
}

// note writes a step. It is durable against the end of the process when note
// returns.
func (j *journal) note(e entry) {
	e.Time = time.Now().UTC()
	if e.Record != nil || e.Used != nil {
		j.last = e
	}
	if j.f != nil {
		b, err := appendEntry(nil, e)
		if err == nil {
			_, err = j.f.Write(b)
		}
		if err != nil {
			j.close() // half a line ends what can be read
			j.failed(err)
		} else if j.size += int64(len(b)); j.size > maxJournal {
			j.rotate()
		}
	}
	if j.step != nil {
		j.step(e)
	}
}

func (j *journal) failed(err error) {
	if err != nil && j.fail != nil {
		j.fail(err)
		j.fail = nil
	}
}

func (j *journal) close() error {
	if j.f == nil {
		return nil
	}
	err := j.f.Close()
	j.f = nil
	return err
}
