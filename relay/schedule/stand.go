package schedule

// stand is the stakes of a strand at one seat.
type stand struct {
	stakes [ways]stake
	next   *stand // of the strand
}

func (sd *stand) set(f *strand, t *seat) {
	for way := range sd.stakes {
		sd.stakes[way] = stake{strand: f, seat: t, way: way}
	}
}

func (sd *stand) enter(urgent bool) {
	sd.stakes[general].enter()
	if urgent {
		sd.stakes[reserved].enter()
	}
}

func (sd *stand) leave() {
	for way := range sd.stakes {
		sd.stakes[way].leave()
	}
}

// enter has a strand that came to have work take part in the contests of its
// site.
func (f *strand) enter() {
	f.extend(nil)
	f.open.enter(f.flow.urgent())
	for sd := f.posted; sd != nil; sd = sd.next {
		sd.enter(f.flow.urgent())
	}
}

// leave takes a strand away from all contests.
func (f *strand) leave() {
	f.open.leave()
	for sd := f.posted; sd != nil; sd = sd.next {
		sd.leave()
	}
}

// extend gives a strand its stands at the site's new places at lanes. What only
// one lane may serve has none at others. They are taken from those at hand, if
// there are any; the rest of these is returned.
func (f *strand) extend(hand []stand) []stand {
	posts := f.turn.site.posts
	for ; f.posts < len(posts); f.posts++ {
		p := posts[f.posts]
		if f.pinned && f.only != p.lane.key {
			continue
		}
		if len(hand) == 0 {
			hand = make([]stand, 1)
		}
		sd := &hand[0]
		hand = hand[1:]
		sd.set(f, &p.seat)
		sd.next, f.posted = f.posted, sd
	}
	return hand
}

// dropPost forgets the stand at a place of its site, which has that index.
func (f *strand) dropPost(p *post, index int) {
	if index >= f.posts {
		return
	}
	f.posts--
	for at := &f.posted; *at != nil; at = &(*at).next {
		if sd := *at; sd.stakes[general].seat == &p.seat {
			sd.leave()
			*at = sd.next
			return
		}
	}
}

// enterPost has all that waits at a site take part at its newest place at a lane.
func (st *site) enterPost() {
	items := st.orders[general].items
	n := 0
	for i := range items {
		n += len(items[i].place.turn.strands)
	}
	hand := make([]stand, n) // all at once; most of them are needed
	for i := range items {
		for _, f := range items[i].place.turn.strands {
			if f.head != nil {
				hand = f.extend(hand)
				f.enter()
			}
		}
	}
}
