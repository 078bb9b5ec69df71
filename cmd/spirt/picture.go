package main

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"golang.org/x/text/width"

	"github.com/spirt-ml/spirt"
	"github.com/spirt-ml/spirt/bill"
	"github.com/spirt-ml/spirt/events"
)

// A frame says how a picture of a run is drawn.
type frame struct {
	job           spirt.Job
	dir           string
	width, height int    // of the terminal in columns and lines
	colour        bool   // colour only repeats what words say
	note          string // from the process that draws, such as that it stops
	state         string // of the run where it is known; else it follows from the events
}

// render draws what is known of a run: lines that are never wider than the
// frame and one fewer than it is high, each with a line end. What does not fit
// is left out, the less important first.
func (f *frame) render(v *events.View, now time.Time) string {
	p := picture{frame: f, view: v, now: now}
	rest := max(f.height-1, 3)
	take := func(n int) int {
		n = max(0, min(n, rest))
		rest -= n
		return n
	}
	note := f.note
	if silent := now.Sub(v.Latest); note == "" && !p.over() && !v.Latest.IsZero() && silent > 10*time.Second {
		note = "no event for " + duration(silent)
	}
	steps, columns := p.stepShares()
	stepLines := (len(steps) + columns - 1) / columns
	curves := v.Round > 1

	take(3) // title, bar, loss and accuracy
	notes := take(min(len(note), 1))
	peers := take(min(len(v.Peers), 4) + 1)
	totals := take(2)
	faults := take(min(len(v.Faults), 1))
	if stepLines > rest {
		stepLines = 0
	}
	take(stepLines)
	curve := 0
	if curves && rest >= 4 {
		curve = take(6)
	}
	peers += take(len(v.Peers) + 1 - peers)
	blank := 0
	if rest >= 4 {
		blank = take(4)
	}
	faults += take(min(len(v.Faults), 5) - faults)
	if curve > 0 {
		curve += take(min(4, rest/2))
	}

	p.title()
	if notes > 0 {
		p.row().add(yellow, " "+note)
	}
	gap := func(lines int) {
		if blank > 0 && lines > 0 {
			p.row()
			blank--
		}
	}
	gap(3)
	p.curves(curve)
	gap(peers)
	p.peers(peers)
	gap(totals)
	p.totals(totals)
	if stepLines > 0 {
		p.steps(steps, columns)
	}
	gap(faults)
	p.faults(faults)
	return p.String()
}

// style is the part of an SGR sequence that switches it on.
type style string

const (
	normal style = ""
	bold   style = "1"
	dim    style = "2"
	red    style = "31"
	green  style = "32"
	yellow style = "33"
	blue   style = "34"
	cyan   style = "36"
)

// row is one line of a picture.
type row struct {
	b      strings.Builder
	width  int // that is taken
	most   int
	colour bool
}

// add adds text, cut to what is left of the row.
func (r *row) add(s style, text string) *row {
	text, n := fit(clean(text), r.most-r.width)
	if n == 0 {
		return r
	}
	r.width += n
	if s == normal || !r.colour {
		r.b.WriteString(text)
	} else {
		r.b.WriteString("\x1b[" + string(s) + "m" + text + "\x1b[0m")
	}
	return r
}

// to moves to a column, counted from 0.
func (r *row) to(column int) *row {
	return r.add(normal, strings.Repeat(" ", max(0, min(column, r.most)-r.width)))
}

// cell adds text in so many columns.
func (r *row) cell(s style, text string, columns int, right bool) {
	text, n := fit(clean(text), columns)
	space := strings.Repeat(" ", columns-n)
	if right {
		r.add(normal, space).add(s, text)
	} else {
		r.add(s, text).add(normal, space)
	}
}

// end adds text at the right edge if there is room for all of it.
func (r *row) end(s style, text string) {
	if n := columns(text); r.width+2+n <= r.most {
		r.to(r.most-n).add(s, text)
	}
}

// clean makes text harmless for a terminal: control characters become spaces,
// invisible ones that would shift or reorder the rest are dropped. Text that
// peers, functions and files hold may have anything in it.
func clean(text string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case unicode.IsControl(r), r == '\u2028', r == '\u2029':
			return ' '
		case unicode.In(r, unicode.Cf, unicode.Variation_Selector):
			return -1
		}
		return r
	}, text)
}

// columnsOf returns how many columns of a terminal a character takes, at most.
func columnsOf(r rune) int {
	if unicode.In(r, unicode.Mn, unicode.Me) {
		return 0
	}
	switch width.LookupRune(r).Kind() {
	case width.EastAsianWide, width.EastAsianFullwidth:
		return 2
	}
	return 1
}

// columns returns how many columns clean text takes.
func columns(text string) (n int) {
	for _, r := range text {
		n += columnsOf(r)
	}
	return n
}

// fit cuts clean text to so many columns, with an ellipsis where something is
// missing, and returns how many it takes.
func fit(text string, most int) (string, int) {
	n := columns(text)
	if n <= most {
		return text, n
	}
	if most <= 0 {
		return "", 0
	}
	n = 0
	for i, r := range text {
		if w := columnsOf(r); n+w > most-1 {
			return text[:i] + "…", n + 1
		} else {
			n += w
		}
	}
	return text, n
}

// picture is a picture while it is drawn.
type picture struct {
	*frame
	view *events.View
	now  time.Time
	rows []*row
}

func (p *picture) row() *row {
	r := &row{most: p.width, colour: p.colour}
	p.rows = append(p.rows, r)
	return r
}

func (p *picture) String() string {
	var b strings.Builder
	for _, r := range p.rows {
		b.WriteString(strings.TrimRight(r.b.String(), " "))
		b.WriteByte('\n')
	}
	return b.String()
}

// over reports whether nothing more will happen.
func (p *picture) over() bool {
	return p.view.Done != nil || p.state != "" && p.state != "running"
}

// title draws what is trained and how far it is.
func (p *picture) title() {
	v, job := p.view, p.job
	r := p.row()
	r.add(bold, fmt.Sprintf(" %s on %s", job.Model, job.Data)).
		add(normal, fmt.Sprintf("  %d peers, %d x %d samples a round", max(job.Peers, len(v.Peers)), job.BatchesPerRound, job.BatchSize))
	if dir := clean(p.dir); r.width+2+columns(dir) <= r.most {
		r.end(dim, dir)
	} else if left := r.most - r.width - 4; left > 8 { // its end says more
		for columns(dir) > left-1 {
			_, first, _ := strings.Cut(dir, string([]rune(dir)[:1]))
			dir = first
		}
		r.end(dim, "…"+dir)
	}

	r = p.row()
	spent := v.Elapsed()
	times := ""
	state, s := p.runState()
	switch {
	case v.Latest.IsZero():
	case s == green:
		times = "in " + duration(spent)
	case p.over():
		times = "after " + duration(spent)
	default:
		since := max(0, p.now.Sub(v.Latest))
		times = duration(spent + since)
		if left := v.Left(uint64(job.Rounds)); left > 0 {
			times += ", " + duration(max(0, left-since)) + " left"
		}
	}
	total := max(1, uint64(job.Rounds))
	round := min(v.Round, total)
	text := fmt.Sprintf(" round %d/%d ", v.Round, job.Rounds)
	tail := fmt.Sprintf(" %3d %%  ", 100*round/total)
	r.add(normal, text).
		add(s, bar(float64(round)/float64(total), max(8, min(60, p.width-columns(text+tail+state+" "+times)-2)), "░")).
		add(normal, tail).add(s, state).add(normal, " "+times)
}

// runState names the state of the run.
func (p *picture) runState() (string, style) {
	state := p.state
	if d := p.view.Done; d != nil && (state == "" || state == "done") {
		switch state = d.StopReason; state {
		case "rounds":
			state = "done"
		case "target":
			state = "target reached"
		case "patience", "time", "money":
			state = "done (" + state + ")"
		}
	}
	switch {
	case state == "", state == "running":
		return "running", cyan
	case strings.HasPrefix(state, "done"), state == "target reached":
		return state, green
	case state == "interrupted":
		return state, yellow
	}
	return state, red
}

// bar draws a share of so many columns in steps of an eighth.
func bar(share float64, columns int, rest string) string {
	if !(share > 0) {
		share = 0
	}
	n := int(min(share, 1)*float64(8*columns) + 0.5)
	b := strings.Repeat("█", n/8)
	full := n / 8
	if n%8 > 0 {
		b += string("▏▎▍▌▋▊▉"[3*(n%8-1):][:3])
		full++
	}
	return b + strings.Repeat(rest, columns-full)
}

// curves draws loss and accuracy, as figures and, in so many lines below, over
// the rounds.
func (p *picture) curves(lines int) {
	v := p.view
	half := p.width / 2
	r := p.row()
	if _, loss, ok := v.Loss.Last(); ok {
		r.add(normal, " loss ").add(bold, strconv.FormatFloat(loss, 'f', 4, 64))
		if _, loss, ok := v.ValidationLoss.Last(); ok {
			r.add(normal, fmt.Sprintf(", on validation %.4f", loss))
		}
	} else {
		r.add(dim, " no round has ended yet")
	}
	r.to(half)
	if round, accuracy, ok := v.Accuracy.Last(); ok {
		r.add(normal, " accuracy ").add(bold, fmt.Sprintf("%.1f %%", 100*accuracy)).add(dim, fmt.Sprintf(" after round %d", min(round, v.Round)))
	}
	if lines < 2 {
		return
	}
	lossLabel := func(y float64) string { return strconv.FormatFloat(y, 'g', 3, 64) }
	left := plot(&v.Loss, half-1, lines, lossLabel)
	right := plot(&v.Accuracy, p.width-half-1, lines, func(y float64) string { return fmt.Sprintf("%.1f %%", 100*y) })
	for i := range lines {
		r := p.row().add(normal, " ")
		add := func(parts [2]string) { r.add(dim, parts[0]).add(cyan, parts[1]) }
		if i < len(left) {
			add(left[i])
		}
		if i < len(right) {
			r.to(half)
			add(right[i])
		}
	}
}

// plotLabel is the width of the labels of a plot.
const plotLabel = 8

// plot draws a curve in dots of braille, two by four a character: axis and
// curve of each line, the last with the first and the last round. It returns
// nothing for less than two points.
func plot(s *events.Series, columns, lines int, label func(y float64) string) [][2]string {
	rounds, values := s.Points()
	w, h := 2*(columns-plotLabel-2), 4*(lines-1)
	if len(rounds) < 2 || w < 4 || h < 4 {
		return nil
	}
	ys := resample(rounds, values, w)
	low, high := slices.Min(ys), slices.Max(ys)
	if high == low {
		low, high = low-0.5, high+0.5
	}
	dots := make([][]rune, lines-1)
	for i := range dots {
		dots[i] = slices.Repeat([]rune{'\u2800'}, w/2)
	}
	level := func(y float64) int {
		share := (high/2 - y/2) / (high/2 - low/2) // without overflow
		if !(share > 0) {
			return 0
		}
		return int(min(share, 1) * float64(h-1))
	}
	// The bits of the dots of a character, by line and column.
	bits := [4][2]rune{{0x01, 0x08}, {0x02, 0x10}, {0x04, 0x20}, {0x40, 0x80}}
	last := level(ys[0])
	for x, y := range ys {
		at := level(y)
		from, to := at, at // with a stroke towards the one before
		if at > last {
			from = last + 1
		} else if at < last {
			to = last - 1
		}
		for l := from; l <= to; l++ {
			dots[l/4][x/2] |= bits[l%4][x%2]
		}
		last = at
	}
	out := make([][2]string, 0, lines)
	for i, d := range dots {
		text, tick := "", " │"
		switch i {
		case 0:
			text, tick = label(high), " ┤"
		case len(dots) - 1:
			text, tick = label(low), " ┤"
		}
		empty := func(r rune) rune {
			if r == '\u2800' { // which some fonts draw
				return ' '
			}
			return r
		}
		out = append(out, [2]string{fmt.Sprintf("%*.*s", plotLabel-1, plotLabel-1, text) + tick, strings.Map(empty, string(d))})
	}
	first, end := strconv.FormatUint(rounds[0], 10), strconv.FormatUint(rounds[len(rounds)-1], 10)
	space := strings.Repeat(" ", max(1, w/2-len(first)-len(end)))
	return append(out, [2]string{strings.Repeat(" ", plotLabel+1) + first + space + end, ""})
}

// resample returns n values of a curve at even distances: the mean of the
// points there, or what lies between those beside it.
func resample(rounds []uint64, values []float64, n int) []float64 {
	sums, counts := make([]float64, n), make([]int, n)
	first, span := rounds[0], rounds[len(rounds)-1]-rounds[0]
	for i, r := range rounds {
		x := int(float64(r-first) / float64(span) * float64(n-1))
		sums[x] += values[i]
		counts[x]++
	}
	before := -1
	for x := range n {
		if counts[x] == 0 {
			continue
		}
		sums[x] /= float64(counts[x])
		for between := before + 1; before >= 0 && between < x; between++ {
			sums[between] = sums[before] + (sums[x]-sums[before])*float64(between-before)/float64(x-before)
		}
		before = x
	}
	return sums
}

// column is one of the table of peers.
type column struct {
	title string
	width int
	right bool
	need  int // the order in which columns get room, the lowest first
	text  func(p *picture, of *events.PeerView) (style, string)
}

func peerColumns() []column {
	return []column{
		{"peer", 4, true, 0, func(_ *picture, of *events.PeerView) (style, string) { return bold, strconv.Itoa(of.Peer) }},
		{"state", 9, false, 1, func(_ *picture, of *events.PeerView) (style, string) { return peerState(of) }},
		{"round", 6, true, 2, func(_ *picture, of *events.PeerView) (style, string) { return normal, strconv.FormatUint(of.Round, 10) }},
		{"lag", 4, true, 3, func(p *picture, of *events.PeerView) (style, string) {
			lag := p.view.Round - min(of.Round, p.view.Round)
			if lag > 2 {
				return yellow, strconv.FormatUint(lag, 10)
			}
			return normal, strconv.FormatUint(lag, 10)
		}},
		{"s/round", 7, true, 4, func(_ *picture, of *events.PeerView) (style, string) { return normal, secondsARound(of) }},
		{"inst", 4, true, 9, func(_ *picture, of *events.PeerView) (style, string) {
			if of.State != "started" {
				return dim, "-"
			}
			return normal, strconv.Itoa(of.Instances)
		}},
		{"cold/warm/failed", 16, true, 6, func(_ *picture, of *events.PeerView) (style, string) {
			n := of.Functions
			s := normal
			if n.Failed > 0 {
				s = yellow
			}
			return s, fmt.Sprintf("%d/%d/%d", n.Cold, n.Invocations-n.Cold, n.Failed)
		}},
		{"sent", 7, true, 7, func(_ *picture, of *events.PeerView) (style, string) { return normal, byteCount(sum(of.Out)) }},
		{"received", 8, true, 8, func(_ *picture, of *events.PeerView) (style, string) { return normal, byteCount(sum(of.In)) }},
		{"waiting for", 11, false, 5, func(_ *picture, of *events.PeerView) (style, string) { return normal, waiting(of) }},
	}
}

func peerState(of *events.PeerView) (style, string) {
	switch state := of.State; {
	case state == "started" && of.Degraded:
		return yellow, "degraded"
	case state == "started":
		return green, "running"
	case state == "finished":
		return green, state
	case state == "stopped", state == "lost":
		return yellow, state
	case state == "":
		return dim, "unknown"
	default:
		return red, state
	}
}

// secondsARound is the mean over the rounds that are kept of a peer.
func secondsARound(of *events.PeerView) string {
	if len(of.Rounds) < 2 {
		if of.Seconds > 0 {
			return strconv.FormatFloat(of.Seconds, 'f', 3, 64)
		}
		return "-"
	}
	first, last := of.Rounds[0], of.Rounds[len(of.Rounds)-1]
	n := float64(max(1, last.Round-min(first.Round, last.Round)))
	return strconv.FormatFloat(max(0, last.Began.Sub(first.Began).Seconds())/n, 'f', 3, 64)
}

func waiting(of *events.PeerView) string {
	if of.Waiting == nil {
		return ""
	}
	text := of.Waiting.Step
	for i, n := range of.Waiting.Members {
		switch {
		case i == 8:
			return text + ",…"
		case i == 0:
			text += " "
		default:
			text += ","
		}
		text += strconv.Itoa(n)
	}
	return text
}

// peers draws the table of peers in so many lines. Where there are more peers,
// those that need a look come first, and a line tells of the others.
func (p *picture) peers(lines int) {
	if lines < 1 {
		return
	}
	if lines == 1 {
		p.otherPeers(p.view.Peers, "")
		return
	}
	all := peerColumns()
	byNeed := slices.Clone(all)
	slices.SortFunc(byNeed, func(a, b column) int { return cmp.Compare(a.need, b.need) })
	room, shown := p.width-1, map[string]bool{}
	for _, c := range byNeed {
		if room -= c.width + 1; room < 0 {
			break
		}
		shown[c.title] = true
	}
	line := func(cell func(c column) (style, string)) {
		r := p.row()
		for _, c := range all {
			if shown[c.title] {
				s, text := cell(c)
				r.add(normal, " ")
				if c.title == "waiting for" {
					r.add(normal, " ").add(s, text)
				} else {
					r.cell(s, text, c.width, c.right)
				}
			}
		}
	}
	line(func(c column) (style, string) { return dim, c.title })
	peers, rest := slices.Clone(p.view.Peers), []*events.PeerView(nil)
	if len(peers) > lines-1 {
		slices.SortStableFunc(peers, func(a, b *events.PeerView) int {
			return cmp.Or(cmp.Compare(urgency(b), urgency(a)), cmp.Compare(a.Round, b.Round))
		})
		peers, rest = peers[:lines-2], peers[lines-2:]
		slices.SortFunc(peers, func(a, b *events.PeerView) int { return cmp.Compare(a.Peer, b.Peer) })
	}
	for _, of := range peers {
		line(func(c column) (style, string) { return c.text(p, of) })
	}
	if len(rest) > 0 {
		p.otherPeers(rest, "more ")
	}
}

// urgency says how much a peer needs a look.
func urgency(of *events.PeerView) int {
	switch {
	case of.State == "started" && of.Degraded:
		return 2
	case of.Waiting != nil:
		return 1
	case of.State == "started", of.State == "finished":
		return 0
	}
	return 3
}

// otherPeers tells of peers in one line.
func (p *picture) otherPeers(peers []*events.PeerView, more string) {
	if len(peers) == 0 {
		p.row().add(dim, " no peer has started yet")
		return
	}
	states, low, high := map[string]int{}, peers[0].Round, peers[0].Round
	for _, of := range peers {
		_, state := peerState(of)
		states[state]++
		low, high = min(low, of.Round), max(high, of.Round)
	}
	var parts []string
	for state, n := range states {
		parts = append(parts, fmt.Sprintf("%d %s", n, state))
	}
	slices.Sort(parts)
	p.row().add(dim, fmt.Sprintf("  %d %speers: %s, rounds %d to %d", len(peers), more, strings.Join(parts, ", "), low, high))
}

// totals draws speed, invocations, traffic and cost in up to two lines.
func (p *picture) totals(lines int) {
	if lines < 1 {
		return
	}
	v := p.view
	var in, out int64
	instances := 0
	for _, of := range v.Peers {
		in, out = in+sum(of.In), out+sum(of.Out)
		if of.State == "started" {
			instances += of.Instances
		}
	}
	r := p.row()
	r.add(normal, " ").add(bold, fmt.Sprintf("%.0f", v.SamplesPerSecond())).add(normal, " images/s ")
	if f := v.Functions; f.Invocations > 0 && lines > 1 {
		r.add(normal, fmt.Sprintf(" %d invocations: %d cold, %d warm, %d failed; %d instances", f.Invocations, f.Cold, f.Invocations-f.Cold, f.Failed, instances))
	}
	if lines > 1 {
		r = p.row()
	}
	spent := v.Spent
	if d := v.Done; d != nil && d.CostUSD != nil {
		spent = *d.CostUSD
	}
	if spent > 0 {
		r.add(normal, " cost ").add(bold, spent.String())
		if total := uint64(p.job.Rounds); !p.over() && v.Round > 0 && v.Round < total {
			r.add(normal, fmt.Sprintf(" of about %s", bill.Money(min(float64(spent)/float64(v.Round)*float64(total), float64(bill.MaxMoney/2)))))
		}
		r.add(normal, " ")
	}
	r.add(normal, fmt.Sprintf(" out %s, in %s", byteCount(out), byteCount(in)))
}

type stepShare struct {
	step  string
	share float64
}

// stepShares returns how the time of all rounds was spent, and in how many
// columns it is drawn. The last two steps, which are rare, are left out where
// they are.
func (p *picture) stepShares() (shares []stepShare, columns int) {
	total := 0.0
	for _, ms := range p.view.Steps {
		total += ms
	}
	columns = max(1, min(6, p.width/28))
	if total <= 0 {
		return nil, columns
	}
	for i, ms := range p.view.Steps {
		if share := ms / total; i < 6 || share >= 0.005 {
			shares = append(shares, stepShare{events.Steps[i], share})
		}
	}
	return shares, columns
}

func (p *picture) steps(shares []stepShare, columns int) {
	cell := (p.width - 1) / columns
	var r *row
	for i, s := range shares {
		if i%columns == 0 {
			r = p.row()
		}
		r.to((i%columns)*cell+1).
			add(normal, fmt.Sprintf("%-7s ", s.step)).
			add(blue, bar(s.share, max(1, cell-7-1-6-2), " ")).
			add(normal, fmt.Sprintf(" %3.0f %%", 100*s.share))
	}
}

// faults draws the last faults in so many lines.
func (p *picture) faults(lines int) {
	list := p.view.Faults
	for _, f := range list[len(list)-min(lines, len(list)):] {
		r := p.row().add(dim, " "+f.Time.In(p.now.Location()).Format("15:04:05")+" ")
		if f.Peer != 0 {
			r.add(normal, fmt.Sprintf("peer %d: ", f.Peer))
		}
		r.add(yellow, faultText(f))
	}
}

// faultText says what a fault is, after who tells it.
func faultText(f events.Fault) string {
	var text string
	switch f.Cause {
	case "lost", "crashed", "failed", "expelled":
		text = fmt.Sprintf("peer %d %s", f.About, f.Cause)
		if f.Message != "" {
			reason := f.Message
			if f.Peer != 0 { // the whole reason stands in the events
				reason, _, _ = strings.Cut(reason, ":")
			}
			text += " (" + reason + ")"
		}
		return text
	}
	return f.Message
}

// duration writes a time to a tenth of a second, or to a second if it is long.
func duration(d time.Duration) string {
	if d < time.Minute {
		return fmt.Sprintf("%.1f s", d.Seconds())
	}
	return d.Round(time.Second).String()
}

// byteCount writes a number of bytes in three digits.
func byteCount(n int64) string {
	f, unit := float64(n), "B"
	for _, larger := range []string{"kB", "MB", "GB", "TB", "PB"} {
		if f < 999.5 {
			break
		}
		f, unit = f/1000, larger
	}
	if f < 9.95 && unit != "B" {
		return fmt.Sprintf("%.1f %s", f, unit)
	}
	return fmt.Sprintf("%.0f %s", f, unit)
}

func sum(m map[int]int64) (n int64) {
	for _, v := range m {
		n += v
	}
	return n
}
