"What a deployed table model says of a row is what `learn.predict` says, whatever the row came as"
import datetime, json, math, warnings
from decimal import Decimal
import numpy as np, pandas as pd, pytest, torch
from fastai.tabular.all import Categorify, CategoryBlock, FillMissing, Normalize, TabularDataLoaders, add_datepart, tabular_learner
from fastai_bnfold.all import *
from fastai_bnfold.deploy.serve import Deployed
from fastai_bnfold.deploy.spec import table_spec
from fastai_bnfold.fold.testing import randomize_bn

n = 60
def missing_at(values, every=7): return [None if i%every==0 else v for i,v in enumerate(values)]
def frame(**columns): return pd.DataFrame(dict(columns, y=['no','yes']*(n//2)), index=range(n))
numbers = np.random.default_rng(0).normal(3, 2, n)
four = [i%4 for i in range(n)]
def dated():
    df = frame(saledate=pd.date_range('2019-12-27', periods=n).astype(str), size=numbers)
    df = add_datepart(df, 'saledate')
    return df[['size',*df.columns.drop('size')]].copy() # (fastai wants the numbers in the order in which it is asked for them)

# name: (data frame, categorical columns, columns of numbers)
tables = {
    'words': (frame(colour=['red','green','blue','grey']*15, size=numbers), ['colour'], ['size']),
    'integers': (frame(shop=four, size=numbers), ['shop'], ['size']),
    'integers only': (frame(shop=four, size=[3*i for i in range(n)]), ['shop'], ['size']),
    'integers, some missing': (frame(shop=missing_at(four), size=numbers), ['shop'], ['size']),
    'floats': (frame(share=[i/10 for i in four], size=numbers), ['share'], ['size']),
    'booleans': (frame(open=[i%2==0 for i in range(n)], size=numbers), ['open'], ['size']),
    'booleans, some missing': (frame(open=missing_at([i%2==0 for i in range(n)]), size=numbers), ['open'], ['size']),
    'digits as words': (frame(zip=['1','2','3','4']*15, size=numbers), ['zip'], ['size']),
    'ordered': (frame(grade=pd.Categorical(list('abcd')*15, categories=list('dcba'), ordered=True), size=numbers), ['grade'], ['size']),
    'numbers missing': (frame(shop=four, size=missing_at(numbers), width=missing_at(numbers, 5)), ['shop'], ['size','width']),
    'dates': (frame(day=pd.to_datetime(['2020-01-01','2020-02-01','2020-03-01','2020-04-01']*15), size=numbers), ['day'], ['size']),
    'datepart': (dated(), ['saleDayofweek','saleIs_month_end','saleMonth'], ['size','saleElapsed']),
    'integer names': (frame().join(pd.DataFrame({0: four, 1: numbers})), [0], [1]),
    'nullable integers': (frame(shop=pd.array(four, dtype='Int64'), size=numbers), ['shop'], ['size']),
    'intervals': (frame(bin=pd.cut(pd.Series(range(n)), 4), size=numbers), ['bin'], ['size']),
}

def learner_of(name):
    df,cats,conts = tables[name]
    dls = TabularDataLoaders.from_df(df, procs=[Categorify,FillMissing,Normalize], cat_names=cats, cont_names=conts, y_names='y', y_block=CategoryBlock(), bs=16, valid_idx=list(range(12)))
    learn = tabular_learner(dls, layers=[8])
    randomize_bn(learn.model)
    for weights in learn.model.embeds.parameters(): torch.nn.init.normal_(weights) # so that categories matter
    return learn

def deployed_from(learn):
    "With the card's table and the model itself: that an engine computes the same is tested elsewhere"
    m = Deployed.__new__(Deployed)
    m.card = json.loads(json.dumps(dict(input=table_spec(learn.dls), inputs=[dict(name='cats', dtype='int64', shape=[None,None]), dict(name='conts', dtype='float32', shape=[None,None])],
                                        output=dict(kind='softmax', vocab=list(learn.dls.vocab)))))
    m.warned = set()
    def run(inputs):
        with torch.no_grad(): return [learn.model.eval()(*map(torch.as_tensor, inputs.values())).numpy()]
    m.run = run
    return m

@pytest.fixture(scope='module', params=tables)
def table(request):
    torch.manual_seed(0)
    learn = learner_of(request.param)
    return learn, deployed_from(learn), tables[request.param][0].drop(columns='y')

def predicted(learn, df):
    with learn.no_bar(), learn.no_logging(): return learn.get_preds(dl=learn.dls.test_dl(df))[0].numpy()
def probs(predictions): return np.stack([p.probs for p in predictions])
def close(got, want): return np.allclose(got, want, atol=1e-5)

def test_frame(table):
    learn,m,df = table
    want,got = predicted(learn, df),m.predict(df)
    assert close(probs(got), want)
    assert [p.label for p in got]==[learn.dls.vocab[i] for i in want.argmax(1)]

def test_rows(table):
    "Every row, and one that has a number missing, as what it may come as"
    learn,m,df = table
    for i in (0,1,2,3,7):
        row = df.iloc[i]
        with learn.no_bar(), learn.no_logging(): label,_,want = learn.predict(row.astype(object) if row.dtype!=object else row)
        for form in (row, row.to_dict(), row.astype(object)):
            assert close(m.predict(form).probs, want), (i, type(form))

def test_dicts_of_numpy(table):
    learn,m,df = table
    records = [{k: np.asarray(v)[()] if isinstance(v, (int,float)) else v for k,v in r.items()} for r in df.to_dict('records')]
    assert close(probs(m.predict(records)), predicted(learn, df))

def test_many(table):
    "A list, a generator, a tuple, named tuples"
    learn,m,df = table
    want = predicted(learn, df)
    records = df.to_dict('records')
    assert close(probs(m.predict(records, bs=7)), want)
    assert close(probs(m.predict(r for r in records)), want)
    assert close(probs(m.predict(tuple(records))), want)
    if all(isinstance(c, str) for c in df): assert close(probs(m.predict(list(df.itertuples(index=False)))), want)

def test_json(table):
    "What a service gets: text, numbers, booleans, null"
    learn,m,df = table
    got = m.predict(json.loads(df.to_json(orient='records', date_format='iso')))
    if 'bin' in df: return # (an interval is no JSON)
    assert close(probs(got), predicted(learn, df))

def small(name):
    torch.manual_seed(0)
    learn = learner_of(name)
    return learn, deployed_from(learn), tables[name][0].drop(columns='y').iloc[1].to_dict()

# name of a table, column, values that are asked
asked = [('integers', 'shop', [3, 3., np.int8(3), np.float64(3), '3', True, 3.5, 9, None, math.nan, pd.NA]),
         ('integers, some missing', 'shop', [3, '3', '3.0', None]),
         ('floats', 'share', [.1, np.float32(.1), 0, '0.1', False]),
         ('booleans', 'open', [True, np.True_, 1, 0, 1., 'True', None]),
         ('booleans, some missing', 'open', [False, 0, 'False']),
         ('words', 'colour', ['red', 'pink', '', None, 1, np.str_('red'), '#na#']),
         ('digits as words', 'zip', ['1', 1, 1., True]),
         ('ordered', 'grade', ['a', 'd', 'e', None]),
         ('dates', 'day', ['2020-02-01', pd.Timestamp('2020-02-01'), np.datetime64('2020-02-01'), datetime.date(2020,2,1), '2021-01-01', 'no date', None])]
@pytest.mark.parametrize('name,column,values', asked, ids=[name for name,*_ in asked])
@pytest.mark.parametrize('words', [False,True], ids=['numbers alone','with words'])
def test_values(name, column, values, words):
    "Values that are, and are not, a category of the training; in a row of numbers, and in one with words"
    learn,m,row = small(name)
    if words: row['note'] = 'text'
    for value in values:
        asks = row | {column: value}
        with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            want,got = learn.predict(pd.Series(asks))[2],m.predict(asks)
        assert close(got.probs, want), (value, type(value))

def test_unseen_is_said_once(recwarn):
    _,m,row = small('words')
    for colour in ('pink','violet','pink',None): m.predict(row | {'colour': colour})
    said = [str(w.message) for w in recwarn if 'no category' in str(w.message)]
    assert len(said)==1 and "'colour'" in said[0] and "'pink'" in said[0]

def test_numbers():
    "Text that is a number counts as one"
    _,m,row = small('integers')
    want = m.predict(row | {'size': 2.5}).probs
    for value in ('2.5', Decimal('2.5'), np.float32(2.5)): assert close(m.predict(row | {'size': value}).probs, want)
    with pytest.raises(DeployError, match="Column 'size': 'big' \\(str\\) is no number"): m.predict(row | {'size': 'big'})
    with pytest.raises(DeployError, match="Column 'size' has no value"): m.predict(row | {'size': pd.NA})

def test_missing_columns():
    _,m,row = small('datepart')
    with pytest.raises(DeployError, match="no column 'saleDayofweek'.*add_datepart\\(df, 'saledate'\\)"): m.predict({'saledate': '2020-01-01', 'size': 1})
    with pytest.raises(DeployError, match="no column 'size'") as e: m.predict({k: v for k,v in row.items() if k!='size'})
    assert 'add_datepart' not in str(e.value)
    with pytest.raises(DeployError, match='row of a table as a dict'): m.predict(3)

def test_one_bad_row():
    _,m,row = small('integers')
    rows = [row, row | {'size': 'big'}, row]
    with pytest.raises(DeployError, match='^Item 1: '): m.predict(rows)
    good,bad,also = m.predict(rows, on_error='return')
    assert isinstance(bad, DeployError) and good.label==also.label

@pytest.mark.parametrize('name', ['numbers missing','integer names','datepart','intervals'])
def test_really_deployed(tmp_path, name):
    "With the check that the card's steps are fastai's"
    learn = learner_of(name)
    with learn.no_bar(): m = learn.deploy(tmp_path/'m', 'eager')
    df = tables[name][0].drop(columns='y')
    assert not m.card['notes'] and close(probs(Deployed(tmp_path/'m').predict(df)), predicted(learn, df))
