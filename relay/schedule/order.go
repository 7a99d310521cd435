package schedule

// place is where a party stands in an order: a tenant at a site, or a tenant in
// a contest.
type place struct {
	account *account
	index   int // 1-based; 0: in no order
	turn    *turn
	entrant *entrant
}

// ranked is a place with what its order knows of the account: its turn when it
// was placed, or later.
type ranked struct {
	round, seq uint64
	place      *place
}

func (r *ranked) before(o *ranked) bool {
	if r.round != o.round {
		return r.round < o.round
	}
	return r.seq < o.seq
}

// mend makes a rank right and reports whether it was.
func (r *ranked) mend() (right bool) {
	a := r.place.account
	right = r.round == a.round && r.seq == a.seq
	r.round, r.seq = a.round, a.seq
	return right
}

// order is a heap of parties by the turn of their accounts. An account is
// charged wherever its party is served, and stands in many orders; so what an
// order knows of it may be old. As turns only move back, the first place is
// right as soon as what is known of it is.
type order struct{ items []ranked }

func (o *order) len() int { return len(o.items) }

func (o *order) push(p *place) {
	r := ranked{place: p}
	r.mend()
	o.items = append(o.items, r)
	o.up(len(o.items) - 1)
}

func (o *order) remove(p *place) {
	i, last := p.index-1, len(o.items)-1
	moved := o.items[last]
	o.items[last] = ranked{}
	o.items = o.items[:last]
	p.index = 0
	if i < last {
		o.items[i] = moved
		moved.place.index = i + 1
		o.up(i)
		o.down(moved.place.index - 1)
	}
}

// maxMends is how many places are mended one by one before all are.
const maxMends = 8

// top returns the party whose turn is first, nil if there is none.
func (o *order) top() *place {
	if len(o.items) == 0 {
		return nil
	}
	for mends := 0; !o.items[0].mend(); mends++ {
		if mends == maxMends {
			o.mend()
			break
		}
		o.down(0)
	}
	return o.items[0].place
}

// mend makes all ranks right at once, which is cheaper when most are old.
func (o *order) mend() {
	for i := range o.items {
		o.items[i].mend()
	}
	for i := len(o.items)/2 - 1; i >= 0; i-- {
		o.down(i)
	}
}

func (o *order) up(i int) {
	r := o.items[i]
	for i > 0 && r.before(&o.items[(i-1)/2]) {
		o.set(i, o.items[(i-1)/2])
		i = (i - 1) / 2
	}
	o.set(i, r)
}

func (o *order) down(i int) {
	r := o.items[i]
	for {
		c := 2*i + 1
		if c >= len(o.items) {
			break
		}
		if c+1 < len(o.items) && o.items[c+1].before(&o.items[c]) {
			c++
		}
		if !o.items[c].before(&r) {
			break
		}
		o.set(i, o.items[c])
		i = c
	}
	o.set(i, r)
}

func (o *order) set(i int, r ranked) {
	o.items[i] = r
	r.place.index = i + 1
}
